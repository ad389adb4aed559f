"""The page on troubleshooting lists messages that the code gives."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def messages() -> list[str]:
    """The messages in the first column of the page's tables."""
    page = (ROOT / "docs/guides/troubleshooting.md").read_text()
    return re.findall(r"^\| `(.*?)` \|", page, re.MULTILINE)


def test_each_message_of_the_page_is_one_of_the_code() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "ruyi_flow").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one text over several lines
    code = re.sub(r"\{[^{}]*\}", "…", code)
    assert len(messages()) > 30
    for message in messages():
        for part in (part.strip(" ():;,.") for part in message.split("…")):
            assert part in code, f"{part!r} of {message!r}"


def test_each_failed_check_is_on_the_page() -> None:
    code = "".join((ROOT / f"ruyi_flow/doctor/{name}.py").read_text() for name in ("agreement", "nodes"))
    texts = re.findall(r'(?:failed|differs)\(\s*(?:ended\(\s*)?f"([^"]+)"', code)
    page = re.sub(r"…+", "…", " ".join(messages()))
    assert len(texts) > 8
    for text in texts:
        longest = max((part.strip(" ():;,.'") for part in re.split(r"\{[^{}]*\}", text)), key=len)
        assert longest in page, text
