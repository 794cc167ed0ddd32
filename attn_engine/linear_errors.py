"""Mistakes that only a linear attention can meet. Part of the catalogue in errors.py."""

from __future__ import annotations

from attn_engine.error_base import AttnEngineError


class ModResult(AttnEngineError, TypeError):
    template = "{mod} returned {got}; expected {expected}."
    advice = "It is called once, with symbols for one token: return what you compute from them."


class MixesTokens(AttnEngineError, TypeError):
    template = "{mod} uses {operation}, which reaches beyond its own token: {reason}."
    advice = (
        "A mod sees one token of one head; do it to the tensor before the call, or let the state carry it."
    )


class MixesDimensions(AttnEngineError, TypeError):
    template = "{mod} gives a value over {got}; expected {expected}."
    advice = "Rows of q and k have another dimension than rows of v: reduce one of them, for example with .sum(-1)."


class DecayRank(AttnEngineError, ValueError):
    template = "decay has shape {got}; expected {expected}."
    advice = "Say decay_rank= when the engine is made, or give a decay per head, per token or per token and dimension."


class DecayPositive(AttnEngineError, ValueError):
    template = "The decay of batch {batch}, head {head}, token {token} is greater than 0 or is not a number."
    advice = "A decay is a natural logarithm, at most 0: a factor f in (0, 1] is log(f); a decay_mod may compute it."


class DecayInfinite(AttnEngineError, ValueError):
    template = "The decay of batch {batch}, head {head}, token {token} is -inf."
    advice = "To forget everything, begin a new sequence there: pack the sequences and pass cu_seqlens=."


class StateMismatch(AttnEngineError, ValueError):
    template = "{argument} has {got}; expected {expected}."
    advice = "A state has a matrix of (D of k) x (D of v) for every sequence and head of v; a normaliser adds a column."


class SequenceBounds(AttnEngineError, ValueError):
    template = "cu_seqlens is {got}; expected {expected}."
    advice = "It holds where each packed sequence begins, and the end: [0, 15, 100] for lengths 15 and 85 in T = 100."


class WrongInputs(AttnEngineError, TypeError):
    template = "{argument} was {got}, but {reason}."
    advice = "{instead}"
