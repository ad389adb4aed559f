"""Geometry and costs, against the published figures of Ruyi-7B and Ruyi2."""

import math

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
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2', an architecture that is not supported; use a Llama, Qwen2 or Qwen3 checkpoint or a "
            "Ruyi family .*or a GGUF file whose general.architecture is llama, .*: ruyi-flow pull FILE.gguf",
        ),
        ({"model_type": ["llama"]}, "model_type is \\['llama'\\]"),
        ({"early_exit_branch_layers": [1, 1]}, "must have one number for each of the"),
        ({"early_exit_branch_layers": [2, 1, 1, 1, 2]}, "and 1 for the last"),
        ({"early_exit_branch_layers": [0, 1, 1, 1, 1]}, "early_exit_branch_layers.0: 0: must be 1 or more"),
        ({"early_exit_branch_layers": [10**9, 1, 1, 1, 1]}, "early_exit_branch_layers.0: 1000000000: must be at most"),
        ({"rope_theta": 0}, "rope_theta: 0: must be above 1"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope settings: rope_theta: 'a': must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope settings: factor: 0: must be above 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' requires factor"),
        ({"rope_scaling": {"type": "su"}}, "rope_type: 'su': must be one of default, dynamic, linear"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is supported only with"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "below high"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "partial_rotary_factor": 0.5}, "only 1 is supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e5}}, "a context of 13107200000"),
        ({"rope_scaling": [1]}, "rope_scaling: \\[1\\]: must be a mapping"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps: -1e-06: must be above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0: must be above 0"),
        ({"hidden_size": None}, "hidden_size: must be a whole number"),
        ({"hidden_size": math.inf}, "hidden_size: inf: must be a whole number"),
        ({"hidden_size": 10**12}, "hidden_size: 1000000000000: must be at most"),
        ({"vocab_size": 10**15}, "vocab_size: 1000000000000000: must be at most"),
        ({"vocab_size": -1}, "vocab_size: -1: must be 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0: must be 1 or more"),
        ({"num_attention_heads": 27}, "num_key_value_heads is 4; it must divide num_attention_heads, which is 27"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads, which is 28"),
        ({"head_dim": 10**9}, "head_dim: 1000000000: must be at most"),
        ({"head_dim": 127}, "head_dim is 127; it must be even"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings: 1000000000000: must be at most"),
        ({"eos_token_id": 1e30}, "eos_token_id.0: 1e\\+30: must be a whole number"),
        ({"eos_token_id": [1, -1]}, "eos_token_id.1: -1: must be 0 or more"),
        ({"eos_token_id": list(range(2000))}, "eos_token_id: .*: must have at most 1024 items"),
        ({"early_exit_points": [5, 3, 27]}, "must ascend"),
        ({"early_exit_points": [5, 11]}, "must ascend, begin at 1 or more and end at 27"),
        ({"early_exit_points": [0, 27]}, "must ascend"),
        ({"early_exit_points": []}, "must ascend"),
        ({"early_exit_points": 5}, "early_exit_points: 5: must be a list"),
        ({"early_exit_points": "246"}, "early_exit_points: '246': must be a list"),
        ({"early_exit_points": None}, "early_exit_points is missing"),
        ({"use_sliding_window": True, "max_window_layers": 27}, "sliding-window"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
            "sliding-window",
        ),
        ({"layer_types": ["full_attention"] * 27}, "sliding-window"),
        ({"model_type": "ruyi_llama", "layer_types": ["sliding_attention"] * 28}, "sliding-window"),
        ({"model_type": "ruyi_llama", "sliding_window": 4096}, "sliding-window"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type 'dynamic' requires factor"),
        ({"layer_types": ["full_attention"] * 27 + ["linear_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"tie_word_embeddings": True}, "requires shared_heads"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers: 'many': must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000: must be at most 1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True: must be a whole number"),
        ({"vocab_size": "x", "hidden_size": -1}, "vocab_size: 'x': must be a whole number .and 1 more."),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        FamilyConfig.parse({**RUYI_7B, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "max_window_layers": 28},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 28},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 131072},
        {"hidden_act": "swish"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"head_dim": None},
        {"num_key_value_heads": None},
    ],
)
def test_a_setting_without_effect_is_accepted(change: dict[str, object]) -> None:
    assert FamilyConfig.parse({**RUYI_7B, **change}).max_positions == 131072


def test_the_context_of_yarn_is_the_original_one_times_the_factor() -> None:
    recipe = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    kept = FamilyConfig.parse({**RUYI_7B, "max_position_embeddings": 32768, "rope_scaling": recipe})
    raised = FamilyConfig.parse({**RUYI_7B, "max_position_embeddings": 131072, "rope_scaling": recipe})
    assert kept.max_positions == raised.max_positions == 131072
    assert dict(kept.rope) == dict(raised.rope)
    alone = FamilyConfig.parse(
        {**RUYI_7B, "max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 2}}
    )
    assert alone.max_positions == 65536 and alone.rope["original_max_position_embeddings"] == 32768


def test_exits_cannot_be_given_to_a_family_that_has_its_own() -> None:
    with pytest.raises(CheckpointError, match="own exits"):
        FamilyConfig.parse(RUYI_7B, exits=(3, 27))
