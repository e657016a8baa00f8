"""A tiny Llama with random weights and its own tokenizer, made on the spot.

`kvhook demo` and the tests run a real engine on it, and nothing has to be fetched from a model hub. It loads
in every vLLM from 0.6.6 to 0.32.0. What it says is gibberish; to the KV cache that makes no difference.

The same seed gives the same bytes. The weights are drawn with numpy and written in the safetensors format by
hand, so that torch need not be imported (seconds) only for that; the tokenizer is trained with `tokenizers`,
which vLLM brings along.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvhook.errors import KvhookError
from kvhook.ring.place import open_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECIPE = 1
"""To be raised with every change to the bytes below; it stands in the marker and in the default folder."""

VOCAB = 512
HIDDEN = 128
LAYERS = 2
HEADS = 4
INTERMEDIATE = 256
MAX_POSITIONS = 2048
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1

MARKER = "kvhook-model.json"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Long enough to fill the vocabulary, so that every id that the model can give has a text.
TRAINING_TEXT = """\
A language model reads a text from left to right and guesses how it goes on, one token at a time. For each
token it keeps two vectors in every layer, a key and a value, and looks back at all of them whenever it
makes the next one. Computing them again at each step would be slow, so the engine keeps them in memory:
that is the cache. It is cut into blocks of the same size, as an operating system cuts memory into pages,
and a table says which block belongs to which request. When a request comes in, the scheduler gives it the
blocks that its prompt needs; while it grows it is given more, and when it is finished they go back to the
free list. A block that is full can be shared. If two prompts begin with the same words, the second one
finds the blocks of the first by their hash and does not compute them again. The share of prompt tokens that
were found in this way is called the hit rate. When many long requests run together the free list becomes
empty. Then some of them have to wait, and the youngest may lose its place: its blocks are taken away, and
it begins anew when there is room. You are a helpful assistant. Please answer the following question in
three short sentences, and say so if you do not know. What is the capital of France, and why does the river
flow to the west? Write a story about a small robot who lived near the sea, counted 0 1 2 3 4 5 6 7 8 9
waves each morning, and wondered what would happen if the number of them was larger than the number of
stars. Summarize the report below, explain each step of your reasoning, and give an example with numbers:
12, 25, 64, 100, 128, 256, 1000 and 2024.
"""


def tiny_model_dir(seed: int = 0) -> Path:
    """Where the tiny model lies by default: `$XDG_CACHE_HOME/kvhook` or `~/.cache/kvhook`, a folder per seed.

    Raises:
        KvhookError: there is no home directory to put it in.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # unset, or relative, which is to be ignored
        try:
            cache = os.path.join(Path.home(), ".cache")
        except RuntimeError as error:
            raise KvhookError(
                "The demo's model needs a folder to be kept in, and this user has no home directory. "
                "Set XDG_CACHE_HOME to a folder that can be written to."
            ) from error
    return Path(cache, "kvhook", f"tiny-llama-{RECIPE}-{seed}")


def make_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """Make the model in the folder `path`, unless it is there already.

    The folder appears whole or not at all: the files are written beside it and the folder is then renamed, so
    that several processes may do this at once.

    Args:
        path: the model's folder; it must not exist, or be empty, or hold a model that this function made.
        seed: of the random weights; the same seed gives the same bytes.

    Returns:
        `path`, for `LLM(model=str(path))`.

    Raises:
        KvhookError: the folder holds something else or cannot be written, or a package is missing.
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, not {seed}")
    if is_complete(path, seed):
        return path
    if path.is_dir():
        strangers = sorted({entry.name for entry in path.iterdir()} - {*FILES, MARKER})
        if strangers:
            raise KvhookError(
                f"{path} holds something else ({', '.join(strangers[:3])}), so no model was made there. "
                "Name a folder that is empty or does not exist."
            )
    name = path.absolute().name
    own = f"{os.getpid()}-{secrets.token_hex(4)}"
    made, old = (path.absolute().with_name(f".{name}.{own}.{what}") for what in ("new", "old"))
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        _write_model(made, seed)
        while not _moved_into_place(made, path) and not is_complete(path, seed):
            # Half a model, or one of another recipe. Another process may be replacing it as well.
            try:
                path.rename(old)
            except FileNotFoundError:
                continue
            shutil.rmtree(old)
    except OSError as error:
        raise KvhookError(
            f"The demo's model cannot be written to {path}: {error.strerror or error}. "
            "By default it goes to XDG_CACHE_HOME; set that to a folder that can be written to."
        ) from error
    finally:
        for leftover in (made, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return path


def is_complete(path: Path, seed: int = 0) -> bool:
    """Whether `path` holds the whole model of this recipe and seed, by its marker and the files' sizes."""
    try:
        with open(open_regular(path / MARKER), encoding="utf-8") as file:
            marker = json.load(file)
        return bool(marker == _marker(path, seed))
    except (OSError, ValueError):
        return False


def _marker(folder: Path, seed: int) -> dict[str, Any]:
    sizes = {name: (folder / name).stat().st_size for name in FILES}
    return {"made_by": "kvhook", "recipe": RECIPE, "seed": seed, "bytes": sizes}


def _moved_into_place(made: Path, path: Path) -> bool:
    """Rename the finished folder; False where something is in the way, which is left as it is."""
    try:
        made.rename(path)  # also onto an empty folder
    except OSError:
        if path.is_dir() and any(path.iterdir()):
            return False
        raise
    return True


def _write_model(folder: Path, seed: int) -> None:
    """All files of the model, the marker last."""
    tokenizer_json = _tokenizer_json()
    _write_safetensors(folder / "model.safetensors", _weights(seed))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / MARKER, _marker(folder, seed))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# As transformers 4 writes it; transformers 5 reads `torch_dtype` and a `rope_theta` at the top level as well,
# while older releases do not read the new names.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": HIDDEN // HEADS,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": MAX_POSITIONS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": EOS,
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


def _tokenizer_json() -> str:
    """Byte-level BPE: any text can be encoded, and no token is added that the text does not hold."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise KvhookError(
            "The demo's model needs the package `tokenizers`, which cannot be imported here "
            f"({error}). It comes with vLLM: `pip install vllm`. Alone: `pip install tokenizers`."
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Having trained in parallel, it would print a warning about deadlocks as soon as vLLM forks its engine.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(), trainer)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    if (size := tokenizer.get_vocab_size()) != VOCAB:
        raise AssertionError(f"the training text gives {size} tokens, not {VOCAB}")
    return str(tokenizer.to_str())


def _shapes() -> dict[str, tuple[int, ...]]:
    """The tensors by their names at Hugging Face."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        shapes[block + "input_layernorm.weight"] = (HIDDEN,)
        for name in "qkvo":
            shapes[f"{block}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[block + "post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[block + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[block + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[block + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def _weights(seed: int) -> dict[str, NDArray[np.uint16]]:
    """The tensors as the bits of bfloat16, which numpy does not know: norms 1, the rest normal around 0."""
    import numpy as np

    draw = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes().items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            values = draw.standard_normal(shape, np.float32) * np.float32(CONFIG["initializer_range"])
        # The upper half of a float32, rounded to the nearest, to even in the middle.
        bits = values.view(np.uint32)
        tensors[name] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return tensors


def _write_safetensors(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    """The file format: length of the header (u64), header (JSON, padded to 8 bytes), the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for bits in tensors.values():
            file.write(bits.tobytes())
