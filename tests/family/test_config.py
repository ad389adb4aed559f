"""Geometry and costs, against the published figures of Ruyi-7B and Ruyi2."""

import pytest

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.config import FamilyConfig

RUYI_7B = {
    "model_type": "ruyi_qwen2",
    "early_exit_points": [11, 15, 19, 23, 27],
    "default_early_exit_point": 27,
    "shared_heads": False,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "vocab_size": 152064,
}
RUYI2 = {
    "model_type": "ee_qwen3",
    "early_exit_points": [2, 21, 39],
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "attention_bias": False,
}


def test_ruyi_7b_has_the_published_sizes() -> None:
    config = FamilyConfig.parse(RUYI_7B)
    assert [round(config.num_parameters(p) / 1e9, 2) for p in config.exits] == [3.34, 4.27, 5.21, 6.14, 7.07]
    assert config.attention_bias and not config.output_bias


def test_ruyi2_has_the_published_sizes() -> None:
    config = FamilyConfig.parse(RUYI2)
    assert [round(config.num_parameters(p) / 1e9, 2) for p in config.exits] == [1.77, 8.04, 13.99]


def test_deeper_branches_count_and_are_named() -> None:
    config = FamilyConfig.parse({**RUYI2, "early_exit_branch_layers": [3, 1, 1]})
    plain = FamilyConfig.parse(RUYI2)
    assert config.num_parameters(2) - plain.num_parameters(2) == 2 * plain.layer_parameters
    assert config.num_parameters(21) == plain.num_parameters(21)
    assert config.branch_prefixes(2) == ["model.eelayers.0", "model.eeblocks.0.0", "model.eeblocks.0.1"]
    assert config.branch_prefixes(39) == ["model.layers.39"]
    assert FamilyConfig.parse(config.to_dict()) == config


def test_stages_lie_between_exits() -> None:
    config = FamilyConfig.parse(RUYI_7B)
    assert config.stages((11, 15)) == ((0, 11), (11, 15))
    assert config.stages((27,)) == ((23, 27),)


def test_rope_settings_for_each_kind_of_layer_are_those_of_full_attention() -> None:
    given = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    config = FamilyConfig.parse({**RUYI2, "rope_parameters": given})
    assert dict(config.rope) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_a_written_config_reads_back_the_same() -> None:
    config = FamilyConfig.parse(RUYI2)
    assert FamilyConfig.parse(config.to_dict()) == config


def test_an_ordinary_checkpoint_takes_exits() -> None:
    raw = {**RUYI2, "model_type": "qwen3"}
    config = FamilyConfig.parse(raw, exits=(2, 21))
    assert config.exits == (2, 21, 39) and config.ordinary and config.shared_heads
    assert FamilyConfig.parse(raw).exits == (39,)
    assert FamilyConfig.parse(config.to_dict()).exits == (2, 21, 39)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"early_exit_branch_layers": [1, 1]}, "must have one number for each of the"),
        ({"early_exit_branch_layers": [2, 1, 1, 1, 2]}, "and 1 for the last"),
        ({"early_exit_branch_layers": [0, 1, 1, 1, 1]}, "early_exit_branch_layers is"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": "a"}}, "a value has the wrong type"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; it must be positive and finite"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"early_exit_points": [5, 3, 27]}, "must ascend"),
        ({"early_exit_points": [5, 11]}, "must ascend, begin at 1 or more and end at 27"),
        ({"early_exit_points": [0, 27]}, "must ascend"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"tie_word_embeddings": True}, "requires shared_heads"),
        ({"num_hidden_layers": "many"}, "a value has the wrong type"),
        ({"early_exit_points": 5}, "a value has the wrong type"),
        ({"early_exit_points": []}, "a value has the wrong type"),
        ({"rope_theta": "x"}, "a value has the wrong type"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        FamilyConfig.parse({**RUYI_7B, **change})


def test_exits_cannot_be_given_to_a_family_that_has_its_own() -> None:
    with pytest.raises(CheckpointError, match="own exits"):
        FamilyConfig.parse(RUYI_7B, exits=(3, 27))
