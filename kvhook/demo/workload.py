"""The demo's work: three rounds whose KV behaviour is worth looking at."""

from __future__ import annotations

from typing import NamedTuple

#: The cache is small, so that a tiny model fills it: 63 usable blocks of 32 tokens.
BLOCK_SIZE = 32
NUM_GPU_BLOCKS = 64
MAX_NUM_SEQS = 16
MAX_MODEL_LEN = 1024


class Round(NamedTuple):
    """Requests of one kind, sent in batches one after the other. ``shows`` says what to look for."""

    title: str
    shows: str
    batches: list[list[str]]
    max_tokens: int


_ROLES = (
    "You are the librarian of a small town. You answer in short and friendly sentences. You name the shelf and the "
    "title, you never make up a book, and when you do not know you say so and offer to look it up until tomorrow.",
    "You check timetables for a railway company. You give the departure, the platform and the changes, in that order, "
    "and you warn of works on the line. You never promise that a connection is kept, since you cannot know that.",
    "You help people to cook with what they have at home. You ask for allergies first, you keep to metric units, and "
    "you suggest one dish at a time with the time it takes. You are never short of an idea for the vegetables.",
)
_QUESTIONS = (
    "What can you tell me about the sea?",
    "How long does it take until evening?",
    "I am in a hurry. What is the best you have?",
    "Is there something for two children?",
    "What was it that I asked you last week?",
    "Please say it again, but slower.",
    "What would you do in my place?",
    "Where do I have to change?",
)


def rounds() -> list[Round]:
    """The demo's rounds, the same in every run."""
    ask = [[f"{role}\n\nQuestion {i}: {q}\nAnswer:" for role in _ROLES] for i, q in enumerate(_QUESTIONS)]
    tales = [
        f"Story {i}. Once upon a time, in town number {i * 37 % 101}, there was a block of keys." for i in range(24)
    ]
    return [
        Round(
            "each system prompt once",
            "the cache is cold: nothing to hit, the blocks are computed and kept",
            ask[:1],
            24,
        ),
        Round(
            "the same system prompts, other questions",
            "the shared beginnings hit: the hit rate climbs",
            ask[1:],
            24,
        ),
        Round(
            "many long answers at once",
            "more than the cache holds: usage fills, requests wait, some are preempted",
            [tales],
            160,
        ),
    ]
