"""What is written down of prompts: nothing that tells a prompt without the key of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from kvhook.export.mooncake import write
from kvhook.whatif.recorded import recorded_requests
from tests.core.conftest import Recording

Make = Callable[..., Recording]
#: A block that an attacker looks for: sixteen tokens that nothing else holds.
SECRET = [431, 17, 288, 402, 95, 361, 244, 477, 130, 29, 318, 456, 73, 212, 389, 150]


def test_a_secret_block_cannot_be_found_in_the_files_without_the_key(driver: Make, tmp_path: Path):
    recording = driver(ledger=True, blocks=60, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256)
    requests = [recording.driver.add([*SECRET, *range(20, 60)], max_tokens=3) for _ in range(2)]
    steps = recording.driver.run()
    next(steps)  # up to 0.10 a prompt is hashed when it is looked up, and its hashes go with the request
    told = [recording.core.reads["hash_of_request"](each) for each in recording.core.reads["hashes"](requests[0])]
    # up to 0.10 a hash is a number
    hashes = [each if isinstance(each, bytes) else repr(each).encode() for each in told]
    list(steps)
    cores = recording.read()
    write(recorded_requests(cores), tmp_path / "requests.jsonl")
    assert recording.ledger is not None
    files = {
        "export": (tmp_path / "requests.jsonl").read_bytes(),
        "ledger": recording.ledger.ring.path.read_bytes(),
        "core": recording.recorder.ring.path.read_bytes(),
    }
    key = recording.recorder.key
    right = hashlib.blake2b(hashes[0], digest_size=8, key=key).digest()
    assert right in files["ledger"], "with the key the block is found, so that the search works"
    assert right not in files["export"]

    # a dictionary attack: the secret is in the dictionary, and vLLM's hash of it is known too
    guesses = [hashes[0], hashes[1], bytes(SECRET[0].to_bytes(4, "little")), repr(SECRET).encode()]
    guesses += [b"".join(token.to_bytes(width, "little") for token in SECRET) for width in (2, 4, 8)]
    for guess in guesses:
        digests = [guess] if len(guess) >= 8 else []
        digests += [hashlib.new(name, guess).digest()[:8] for name in ("sha256", "md5", "blake2b")]
        digests += [hashlib.blake2b(guess, digest_size=8, key=bytes(16)).digest()]
        for name, content in files.items():
            for digest in digests:
                assert digest[:8] not in content, name
                assert digest[:8].hex().encode() not in content, name
                assert str(int.from_bytes(digest[:8], "little")).encode() not in content, name
    for name, content in files.items():
        assert key not in content, name
        assert key.hex().encode() not in content, name
        assert key[:6].hex().encode() not in content, name
