"""The prepared cache of the hub, and what ``--shape`` may name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from huggingface_hub import hf_hub_download, snapshot_download

from pytest_vram.errors import VramUsageError
from pytest_vram.standins import hub
from pytest_vram.standins.model import ModelStandIn, Written, parse_shape, write_model

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path / "shape" / "config.json"


def test_the_cache_is_one_that_the_hub_reads_and_has_the_users_own_too(config: Path, tmp_path: Path) -> None:
    own = tmp_path / "home" / "hub"
    for name in ("models--acme--tiny", "models--acme--other"):
        (own / name / "snapshots").mkdir(parents=True)
    (tmp_path / "home" / "datasets" / "acme___rows").mkdir(parents=True)
    (tmp_path / "home" / "datasets" / "acme___mine").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    place = tmp_path / "cache"
    place.mkdir()
    models = [ModelStandIn(name="acme/tiny", source=str(config))]
    variables, made = hub.prepare(place, models, {"acme/Rows": rows}, {"HF_HOME": str(tmp_path / "home")})
    assert made == {"acme/tiny": Written(weights=True, tokenizer=True)}
    cache = variables["HF_HUB_CACHE"]
    file = hf_hub_download("acme/tiny", "config.json", cache_dir=cache, local_files_only=True)
    assert json.loads(Path(file).read_text())["hidden_size"] == 64
    folder = Path(snapshot_download("acme/tiny", cache_dir=cache, local_files_only=True))
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
    data = snapshot_download("acme/Rows", repo_type="dataset", cache_dir=cache, local_files_only=True)
    assert (Path(data) / "rows.jsonl").read_text() == rows.read_text()
    assert (Path(cache) / "models--acme--other").resolve() == own / "models--acme--other"
    prepared = Path(variables["HF_DATASETS_CACHE"])
    assert [path.name for path in prepared.iterdir()] == ["acme___mine"], "not the rows of the data set's own"
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_weights_and_tokenizer_of_a_folder_are_used(config: Path, tmp_path: Path) -> None:
    (config.parent / "model.safetensors").write_bytes(b"mine")
    (config.parent / "tokenizer.json").write_text("{}")
    made = write_model(ModelStandIn(name="acme/tiny", source=str(config.parent)), tmp_path / "out")
    assert made == Written(weights=False, tokenizer=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"


def test_a_configuration_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "quantization_config": {"bits": 4}}))
    with pytest.raises(VramUsageError, match=r"--shape acme/tiny=.*quantized already"):
        write_model(ModelStandIn(name="acme/tiny", source=str(tmp_path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("=config.json", "NAME=PATH"),
        ("acme/tiny=", "NAME=PATH"),
        ("acme/tiny=nowhere.json", "neither a config.json"),
        ("acme/tiny", "neither a config.json"),
        ("acme/x=mistrl-7b", "did you mean mistral-7b"),
        ("./folder", "a folder has no shape of its own"),
    ],
)
def test_a_shape_that_cannot_be(text: str, why: str) -> None:
    with pytest.raises(VramUsageError, match=why):
        parse_shape(text)


def test_a_known_name_is_enough() -> None:
    assert parse_shape("meta-llama/Llama-3.1-8B-Instruct").source == "meta-llama/Llama-3.1-8B-Instruct"
    assert parse_shape("acme/mine=llama-3.1-8b") == ModelStandIn(name="acme/mine", source="llama-3.1-8b")


def test_a_folder_that_is_there_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(VramUsageError, match="there is such a folder already"):
        hub.write_folder(ModelStandIn(name=str(tmp_path / "mine"), source=str(config)))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(VramUsageError, match="no model_type"):
        hub.write_folder(ModelStandIn(name=str(tmp_path / "new"), source=str(tmp_path / "bad.json")))
    assert not (tmp_path / "new").exists()


def test_known_names_are_found_in_the_command_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text("base_model: meta-llama/Llama-3.2-1B\ndata: tatsu-lab/alpaca\n")
    (tmp_path / "hub" / "models--google--gemma-2-2b" / "snapshots").mkdir(parents=True)
    command = [
        "train",
        str(tmp_path / "x.yml"),
        "--model=Qwen/Qwen2.5-7B",
        "--ref",
        "google/gemma-2-2b",
        "someone/mistral-7b",
    ]
    assert hub.known_names(command, {"HF_HOME": str(tmp_path)}) == ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-7B"]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
    ],
)
def test_the_users_cache_is_where_the_hub_looks(environment: dict[str, str], folder: str) -> None:
    assert hub.hub_cache(environment) == Path(folder)


def test_a_stand_in_without_transformers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtune and LitGPT do not bring transformers into their environments."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    wanted = "--shape ./model=qwen2.5-0.5b: transformers .* not installed here: pip install transformers"
    with pytest.raises(VramUsageError, match=wanted):
        write_model(parse_shape("./model=qwen2.5-0.5b"), tmp_path / "model")
