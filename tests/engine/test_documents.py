"""README.md and docs/: code that needs an engine runs on the tiny model, whatever model a page names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import documents
from tests.engine import vllm_here

pytest.importorskip("sybil")

WITH_ENGINE = [page for page in documents.PAGES if documents.needs_engine(page)]


@pytest.mark.parametrize("page", documents.names(WITH_ENGINE))
def test_what_a_page_shows_is_what_its_code_prints(
    page: Path, fresh: Path, engine_environment: dict[str, str], model: str, monkeypatch: pytest.MonkeyPatch
):
    import vllm

    vllm_here.stand_numba()
    real, tiny = vllm.LLM, fresh / "models" / "tiny-llama"
    tiny.parent.mkdir()
    tiny.symlink_to(model)

    def make(model: str, **options: Any) -> Any:
        vllm_here.collect_engines()  # that of the page before, see make_llm
        return real(model=str(tiny), **vllm_here.options() | options)

    monkeypatch.setattr(vllm, "LLM", make)
    folder = fresh / "project"
    # commands of a page make engines in processes of their own, which find the tiny model under the page's name
    (folder / "facebook").mkdir(parents=True)
    (folder / "facebook" / "opt-125m").symlink_to(model)
    documents.run(page, folder)
