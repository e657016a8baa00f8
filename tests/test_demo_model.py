"""The demo's tiny model: same bytes for the same seed, whole or not there, and readable by what vLLM uses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvhook.demo import model
from kvhook.demo.model import FILES, MARKER, is_complete, make_tiny_model, tiny_model_dir
from kvhook.errors import KvhookError

tokenizers = pytest.importorskip("tokenizers", reason="making the tiny model needs `tokenizers` (vLLM has it)")


def digest(folder: Path) -> str:
    h = hashlib.sha256()
    for name in (*FILES, MARKER):
        h.update((folder / name).read_bytes())
    return h.hexdigest()


def only_entry(folder: Path) -> str:
    (name,) = [entry.name for entry in folder.iterdir()]
    return name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_in_process(folder: Path, **env: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from pathlib import Path; from kvhook.demo.model import make_tiny_model\n"
        "make_tiny_model(Path(sys.argv[1]))\n"
        "print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(model.__file__).parents[2]), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_same_seed_same_bytes_in_every_process(tiny: Path, tmp_path: Path) -> None:
    # Other hashes of str and other threads must not change the order of anything.
    process = make_in_process(tmp_path / "m", PYTHONHASHSEED="7", RAYON_NUM_THREADS="3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert output.strip() == "", "nothing big is imported and nothing printed"
    assert digest(tmp_path / "m") == digest(tiny)


def test_another_seed_gives_other_weights(tiny: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "m", seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="-1"):
        make_tiny_model(tmp_path / "n", seed=-1)


def test_second_call_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "m")
    monkeypatch.setattr(model, "_write_model", None)
    assert make_tiny_model(folder) == folder
    assert only_entry(tmp_path) == "m"
    assert {entry.name for entry in folder.iterdir()} == {*FILES, MARKER}


@pytest.mark.parametrize("damage", ["no marker", "bad marker", "other recipe", "other seed", "file gone", "cut"])
def test_what_is_incomplete_is_made_anew(tiny: Path, tmp_path: Path, damage: str) -> None:
    folder = make_tiny_model(tmp_path / "m", seed=1 if damage == "other seed" else 0)
    if damage == "no marker":
        (folder / MARKER).unlink()
    elif damage == "bad marker":
        (folder / MARKER).write_text("{")
    elif damage == "other recipe":
        (folder / MARKER).write_text((folder / MARKER).read_text().replace('"recipe": ', '"recipe": 9'))
    elif damage == "file gone":
        (folder / "config.json").unlink()
    elif damage == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    assert not is_complete(folder)
    assert digest(make_tiny_model(folder)) == digest(tiny)
    assert only_entry(tmp_path) == "m"


def test_empty_folder_and_missing_parents_are_fine(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert digest(make_tiny_model(folder)) == digest(tiny)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(KvhookError, match=r"thesis\.tex"):
        make_tiny_model(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.json", "thesis.tex"}
    with pytest.raises(KvhookError, match="cannot be written"):
        make_tiny_model(tmp_path / "thesis.tex")
    with pytest.raises(KvhookError, match="XDG_CACHE_HOME"):
        make_tiny_model(tmp_path / "thesis.tex" / "below")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_write_json", full)
    with pytest.raises(KvhookError, match="No space left on device"):
        make_tiny_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_several_processes_at_once(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make_tiny_model(folder, seed=5)  # so that each of them finds something to be replaced
    processes = [make_in_process(folder) for _ in range(4)]
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    assert digest(folder) == digest(tiny)
    assert only_entry(tmp_path) == "m"


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"tiny-llama-{model.RECIPE}-3"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiny_model_dir(3) == tmp_path / "kvhook" / name
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert tiny_model_dir(3) == tmp_path / "home" / ".cache" / "kvhook" / name


def test_no_tokenizers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(KvhookError, match="pip install tokenizers"):
        make_tiny_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_training_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    make_tiny_model(tmp_path / "a")
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    make_tiny_model(tmp_path / "b")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_every_id_has_a_text_and_every_text_comes_back(tiny: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    config = json.loads((tiny / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 512
    assert tokenizer.token_to_id(model.BOS) == config["bos_token_id"]
    assert tokenizer.token_to_id(model.EOS) == config["eos_token_id"]
    text = "Hello, “ünïcode” 你好  two  spaces\n\ttab \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    # It has learned something: English takes far fewer tokens than bytes.
    assert len(tokenizer.encode(model.TRAINING_TEXT).ids) < 0.5 * len(model.TRAINING_TEXT)


@pytest.mark.engine
def test_libraries_of_the_engine_read_it(tiny: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch, which comes with vLLM, is not installed")
    safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.from_pretrained(tiny)
    llama = transformers.LlamaForCausalLM(config)
    tensors = safetensors_torch.load_file(tiny / "model.safetensors")
    # Names and shapes are exactly the architecture's, and none is missing.
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: tuple(t.shape) for name, t in llama.state_dict().items()
    }
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    embedding = tensors["model.embed_tokens.weight"].float()
    assert math.isclose(embedding.std().item(), config.initializer_range, rel_tol=0.02)
    assert abs(embedding.mean().item()) < 0.001

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 512)
    assert tokenizer.decode(tokenizer.encode("The cache.")) == "The cache."
    chat = [{"role": "user", "content": "hi"}]
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert template == "user: hi\nassistant: "
