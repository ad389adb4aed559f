"""A reply as people see it: JSON, a short text, and HTML in the colours of the tiers."""

import re
from html.parser import HTMLParser

import pytest

from ruyi_flow import AsyncClient, Client
from ruyi_flow.cli.display import token_text
from ruyi_flow.config.topology import Topology
from ruyi_flow.reply import TIER_COLOURS, Reply, tier_colour
from ruyi_flow.testing import Cluster
from ruyi_flow.types import FinishReason, Hop, Reason, Stats, Token


def reply_of(*tokens: tuple[str, str], nodes: tuple[str, ...] = ("device", "edge", "cloud")) -> Reply:
    """A reply of (text, node) tokens."""
    made = tuple(Token(i, text, 5, node, 0.5, Reason.CONFIDENT) for i, (text, node) in enumerate(tokens))
    stats = Stats(3, len(made), 0.05, 1.0, None, 0, 0, 2, tuple(Hop(node) for node in nodes))
    return Reply("".join(text for text, _ in tokens), made, FinishReason.LENGTH, stats)


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text that follows)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attrs, text = self.elements[-1]
            self.elements[-1] = tag, attrs, text + data


def test_a_reply_is_one_json_object(whole: Client) -> None:
    data = whole.generate("hi", max_new_tokens=3, eos_token_ids=()).to_dict()
    assert set(data) == {"text", "token_ids", "finish_reason", "tokens", "stats"}
    rated = whole.generate("hi", max_new_tokens=1, eos_token_ids=(), logprobs=2, prompt_logprobs=0).to_dict()
    assert [set(top) for top in rated["tokens"][0]["logprobs"]["top"]] == [{"id", "text", "logprob"}] * 2
    assert [token["text"] for token in rated["prompt"]["tokens"]] == list(rated["prompt"]["text"])
    about = {"id", "text", "exit", "node", "confidence", "reason", "after_s", "bytes_up", "logprobs"}
    assert set(data["tokens"][0]) == about and data["tokens"][0]["logprobs"] is None
    assert {"first_token_s", "token_s", "total_s", "hops"} <= set(data["stats"])
    assert {"node", "compute_s", "queue_s", "wire_s", "messages", "bytes_up", "bytes_down"} <= set(
        data["stats"]["hops"][0]
    )


def test_a_reply_is_short_as_text() -> None:
    reply = reply_of(("The", "device"), (" sky", "device"), (" is", "cloud"))
    assert repr(reply) == "Reply('The sky is', 3 tokens: device 2, edge 0, cloud 1; length)"
    long = reply_of(*[(" word", "edge")] * 1000)
    assert len(repr(long)) < 140 and " …', 1000 tokens: device 0, edge 1000, cloud 0; length)" in repr(long)
    assert repr(reply_of(nodes=())) == "Reply('', 0 tokens; length)"
    assert len(repr(long.tokens[0])) < 60 and len(repr(long.stats)) < 140


async def test_a_reply_of_nodes_counts_what_each_decided(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        reply = await client.generate("hi", mode="token", threshold=0.05, max_new_tokens=30, eos_token_ids=())
    assert list(reply.decided_by)[0] == "n0" and sum(reply.decided_by.values()) == 30
    for node, count in reply.decided_by.items():
        assert count == sum(token.node == node for token in reply.tokens)


def test_html_has_each_token_in_the_colour_of_its_node() -> None:
    reply = reply_of(("The", "device"), (" <b>&\"'", "edge"), ("\n", "cloud"), ("", "cloud"))
    page = Page(reply._repr_html_())
    spans = [(attrs, text) for tag, attrs, text in page.elements if tag == "span"]
    tokens, legend = [s for s in spans if "title" in s[0]], [s for s in spans if "title" not in s[0]]
    assert [text for _, text in tokens] == ["The", " <b>&\"'", "\n"], "the text itself, whatever it contains"
    assert [text.split()[:2] for _, text in legend] == [["device", "1"], ["edge", "1"], ["cloud", "2"]]
    assert f"{reply.stats.summary} · length" in page.elements[-1][2]
    for (attrs, _), tier in zip(tokens, TIER_COLOURS, strict=False):
        assert tier.background in str(attrs["style"])
        assert re.fullmatch(r"(device|edge|cloud), exit 5, confidence 0.50, confident", str(attrs["title"]))
    assert {tag for tag, _, _ in page.elements} == {"div", "span"}, "no scripts, nothing that is loaded"
    assert "http" not in reply._repr_html_() and "url(" not in reply._repr_html_()


def test_html_escapes_what_a_node_says() -> None:
    name = '"><script>alert(1)</script>'
    text = reply_of(("<img src=x onerror=alert(1)>", name), nodes=(name,))._repr_html_()
    assert {tag for tag, _, _ in Page(text).elements} == {"div", "span"}


def test_a_node_that_no_hop_names_has_a_colour() -> None:
    assert "stranger 1" in reply_of(("x", "stranger"))._repr_html_()


@pytest.mark.parametrize("page", [(255, 255, 255), (17, 17, 17)])
def test_text_can_be_read_on_light_and_dark_pages(page: tuple[int, int, int]) -> None:
    """WCAG 2: a contrast of at least 4.5 between text and background."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = luminance([33.0] * 3 if page[0] > 127 else [224.0] * 3)
    for tier in TIER_COLOURS:
        red, green, blue, alpha = bytes.fromhex(tier.background[1:])
        mixed = [(c * alpha + p * (255 - alpha)) / 255 for c, p in zip((red, green, blue), page, strict=True)]
        low, high = sorted([text, luminance(mixed)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, tier


def test_the_command_line_has_the_same_colours() -> None:
    names = [f"n{i}" for i in range(8)]
    exits = [{"name": name, "exits": [i + 1], "address": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(names)]
    links = [{"from": a, "to": b} for a, b in zip(names, names[1:], strict=False)]
    topology = Topology.parse({"family": "x", "nodes": exits, "links": links})
    for name in names:
        styled = token_text(topology, Token(0, "x", 1, name, 0.5, Reason.CONFIDENT))
        assert styled.style == tier_colour(names, name).terminal
    assert tier_colour(names, "n0") == tier_colour(names, "n6") != tier_colour(names, "n1")
