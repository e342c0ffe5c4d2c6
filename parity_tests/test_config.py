"""`conf.yml` and `TransformerConfig`: what loads, and what each mistake says."""

import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from vq_common import BenchConfig, TrainConfig, TransformerConfig, load_config
from vq_common.config import UNUSED_KEYS

CONF = Path(__file__).parents[1] / "conf.yml"

# A flat file as users of the original have it: its keys, quotes, 0/1 flags and device word.
ORIGINAL = "\n".join(
    [
        "d_model: 512\nd_k: 64\nd_v: 64\nn_head: 2\nn_code: 32\nn_code_k: 32\nn_code_q: 32",
        "sequence_len: 256\nglobal_batch_size: 2\nblock_len: 16\nmem_len: 48",
        "param_dtype: 'float32'\ndtype: 'float32'\ndevice: 'gpu'",
        "p_dropres: 0.2\nc_beta: 0.0002\nc_gamma: 0.98",
        *(f"{name}: 1" for name in UNUSED_KEYS),
    ]
)


def names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def load(tmp_path: Path, text: str) -> TransformerConfig:
    path = tmp_path / "conf.yml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_conf_yml_has_every_key_and_no_other() -> None:
    mapping = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    assert set(mapping) == names(TransformerConfig)
    assert set(mapping["bench"]) == names(BenchConfig)
    assert set(mapping["train"]) == names(TrainConfig)


def test_conf_yml_loads_without_warning() -> None:
    config = load_config(CONF)
    assert (config.d_model, config.n_head, config.d_k, config.d_v) == (1024, 4, 64, 64)
    assert (config.n_code, config.n_code_q, config.n_code_k) == (128, 128, 128)
    assert config.c_beta == 1e-4
    assert config.is_causal
    assert max(config.bench.lengths) == 262144


def test_basic_usage_of_the_original() -> None:
    with CONF.open(encoding="utf-8") as file:
        config = yaml.load(file, Loader=yaml.FullLoader)  # noqa: S506 (the call that users make)
    assert TransformerConfig(**config) == load_config(CONF)


def test_original_file_loads_and_reports_each_unused_key(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load(tmp_path, ORIGINAL)
    messages = [str(warning.message) for warning in caught]
    for name in UNUSED_KEYS:
        assert sum(message.startswith(f"config: {name} has no effect: ") for message in messages) == 1
    assert sum("gpu" in message and "cuda" in message for message in messages) == 1
    assert len(messages) == len(UNUSED_KEYS) + 1
    assert (config.block_len, config.p_dropres, config.device) == (16, 0.2, "cuda")


@pytest.mark.parametrize("name", sorted(UNUSED_KEYS))
def test_each_unused_key_is_accepted_with_any_value(name: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(f"config: {name} has no effect: {UNUSED_KEYS[name]}")):
        assert TransformerConfig(**{name: object()}) == TransformerConfig()


@pytest.mark.parametrize("key", [{"n_layer": 4}, {"device": "gpu"}])
def test_a_warning_points_at_the_line_that_built_the_config(key: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="config: ") as caught:
        TransformerConfig(**key)
    assert [warning.filename for warning in caught] == [__file__]


def test_derived_defaults() -> None:
    config = TransformerConfig(d_model=96, n_head=3, n_code=7, n_code_k=11)
    assert (config.d_k, config.d_v) == (32, 32)
    assert (config.n_code_q, config.n_code_k) == (7, 11)
    assert TransformerConfig(d_k=None) == TransformerConfig()


@pytest.mark.parametrize(
    "text, misspelt, nearest",
    [
        ("n_heads: 4", "n_heads", "n_head"),
        ("d_modle: 4", "d_modle", "d_model"),
        ("codebook_int: data", "codebook_int", "codebook_init"),
        ("bench: {n_repeats: 3}", "n_repeats", "n_repeat"),
        ("bench: {length: [3]}", "length", "lengths"),
        ("train: {learning_rates: 0.1}", "learning_rates", "learning_rate"),
    ],
)
def test_a_misspelt_key_names_the_nearest(tmp_path: Path, text: str, misspelt: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{misspelt}', did you mean '{nearest}'\\? Known keys"):
        load(tmp_path, text)


def test_a_key_that_is_near_nothing_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"config: unknown key 'zzz'\. Known keys: bench, block_len, .*train"
    ):
        TransformerConfig(zzz=1)  # type: ignore[call-arg]


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"conf\.yml: unknown key 'zzz'"):
        load(tmp_path, "zzz: 1")


@pytest.mark.parametrize("text", ["3: 4", "null: 4", "true: 4", "2026-01-02: 4"])
def test_a_key_that_is_no_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"conf\.yml: unknown key "):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("n_head", True, "n_head must be an integer >= 1, found True (bool)"),
        ("n_head", 2.0, "n_head must be an integer >= 1, found 2.0 (float)"),
        ("n_head", "2", "n_head must be an integer >= 1, found '2' (str)"),
        ("n_head", None, "n_head must be an integer >= 1, found None (NoneType)"),
        (
            "c_beta",
            "1e-3",
            "c_beta must be a finite number >= 0.0, found '1e-3' (str) (YAML reads it as text: write 0.001)",
        ),
        ("c_beta", "much", "c_beta must be a finite number >= 0.0, found 'much' (str)"),
        ("c_gamma", True, "c_gamma must be a number in [0.0, 1.0], found True (bool)"),
        ("is_causal", 1, "is_causal must be true or false, found 1 (int)"),
        ("is_causal", "yes", "is_causal must be true or false, found 'yes' (str)"),
        ("bench", None, "bench must be a mapping of its own keys, found None (NoneType)"),
        ("bench", [1], "bench must be a mapping of its own keys, found [1] (list)"),
        ("bench", {"lengths": 5}, "bench: lengths must be a non-empty list of integers, found 5 (int)"),
        ("bench", {"lengths": []}, "bench: lengths must be a non-empty list of integers, found [] (list)"),
        ("bench", {"lengths": [5, True]}, "bench: lengths[1] must be an integer >= 1, found True (bool)"),
        ("train", {"n_step": 1.5}, "train: n_step must be an integer >= 1, found 1.5 (float)"),
    ],
)
def test_wrong_type(key: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        TransformerConfig(**{key: value})


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("d_model", -1024, "d_model must be an integer >= 1, found -1024"),
        ("block_len", 0, "block_len must be an integer >= 1, found 0"),
        ("mem_len", -1, "mem_len must be an integer >= 0, found -1"),
        ("c_beta", -1e-4, "c_beta must be a finite number >= 0.0, found -0.0001"),
        ("c_beta", math.nan, "c_beta must be a finite number >= 0.0, found nan"),
        ("c_beta", math.inf, "c_beta must be a finite number >= 0.0, found inf"),
        ("c_gamma", 1.5, "c_gamma must be a number in [0.0, 1.0], found 1.5"),
        ("p_dropres", 1, "p_dropres must be under 1, found 1.0"),
        (
            "dtype",
            "float23",
            "dtype must be one of float64, float32, bfloat16, float16, found 'float23' (str), did you mean",
        ),
        ("device", "tpu", "device must be one of auto, cuda, mps, cpu, found 'tpu' (str)"),
        ("codebook_init", "kmean", "found 'kmean' (str), did you mean 'kmeans'?"),
        ("bench", {"lengths": [1024, 0]}, "bench: lengths[1] must be an integer >= 1, found 0"),
        (
            "bench",
            {"max_memory_fraction": 1.1},
            "bench: max_memory_fraction must be a number in [0.0, 1.0], found 1.1",
        ),
        ("train", {"learning_rate": -1.0}, "train: learning_rate must be a finite number >= 0.0, found -1.0"),
    ],
)
def test_wrong_value(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerConfig(**{key: value})


@pytest.mark.parametrize("given", ["d_k", "d_v"])
def test_heads_that_do_not_divide_the_width(given: str) -> None:
    derived = {"d_k": "d_v", "d_v": "d_k"}[given]
    with pytest.raises(ValueError, match=f"{derived} is not given and d_model = 100 .* n_head = 3"):
        TransformerConfig(d_model=100, n_head=3, **{given: 32})
    config = TransformerConfig(d_model=100, n_head=3, d_k=32, d_v=16)
    assert (config.d_k, config.d_v) == (32, 16)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_mps_has_no_float64(name: str) -> None:
    with pytest.raises(ValueError, match="must not be float64 with device = mps"):
        TransformerConfig(device="mps", **{name: "float64"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_head: 1\nd_model: 8\nn_head: 2\n", "line 3, column 1: key 'n_head' is given twice"),
        ("bench:\n  seed: 1\n  seed: 1\n", "line 3, column 3: key 'seed' is given twice"),
        ("n_head: [1", "not a YAML file"),
        ("? [1, 2]\n: 3\n", "not a YAML file"),
    ],
)
def test_files_that_are_no_mapping_of_keys(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize("text, found", [("", "NoneType"), ("- 1\n- 2\n", "list"), ("n_head", "str")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(TypeError, match=f"conf.yml: must be a mapping of keys, found {found}"):
        load(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "conf.yml")


def test_yaml_merge_keys_work(tmp_path: Path) -> None:
    config = load(tmp_path, "bench: &seeded {seed: 5}\ntrain:\n  <<: *seeded\n  n_step: 3\n")
    assert (config.bench.seed, config.train.seed, config.train.n_step) == (5, 5, 3)


def test_a_section_may_be_given_in_part() -> None:
    config = TransformerConfig(bench={"n_repeat": 3}, train=TrainConfig(n_step=7))
    assert config.bench == BenchConfig(n_repeat=3)
    assert config.train.n_step == 7


def test_frozen_equal_and_hashable() -> None:
    config = load_config(CONF)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_head = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bench.seed = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        TransformerConfig(1024)  # type: ignore[misc]
    assert hash(config) == hash(load_config(CONF))
    assert isinstance(config.bench.lengths, tuple)
    assert isinstance(TransformerConfig(c_beta=0).c_beta, float)


def test_replace_checks_again() -> None:
    config = load_config(CONF)
    assert dataclasses.replace(config, block_len=7).block_len == 7
    assert dataclasses.replace(config, block_len=7).d_model == config.d_model
    with pytest.raises(ValueError, match="block_len must be an integer >= 1"):
        dataclasses.replace(config, block_len=0)
    with pytest.raises(ValueError, match="unknown key 'n_heads', did you mean 'n_head'"):
        dataclasses.replace(config, n_heads=2)  # type: ignore[call-arg]
