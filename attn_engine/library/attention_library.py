"""AttentionLibrary: a prebuilt attention by the names of its parts."""

from __future__ import annotations

import math
import textwrap
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from attn_engine.engine import AttentionEngine
from attn_engine.errors import MissingParameter, UnknownOption, UseNotSupported
from attn_engine.explain import Explanation, Kernel
from attn_engine.frontend import MaskMod, MetaTensor, ScoreMod, meta_tensor
from attn_engine.library.catalogue import ATTENTIONS, CALLED, MASKS, USE_TYPES, Entry, found
from attn_engine.runtime.backends import NAMES


class AttentionLibrary:
    """An attention of the library, made of a normaliser with its score function, and a mask.

    attn_type, mask_type: names of `AttentionLibrary.list()`, such as "SoftmaxAttention" and "Causal"; case and
        underscores do not matter.
    use_types: "Train": queries and keys begin at the same position. "Prefill", "Decode": the queries are the last
        ones, so that query i has position i + len(keys) - len(queries).
    qkv_meta: as of an AttentionEngine. None: read from the first tensors, and again when their type changes.
    layout, backend, scale: as of an AttentionEngine; scale None: the attention's own, mostly 1/sqrt(D).
    parameters: of the attention and the mask, by name: `window=512`, `slopes=...`.

    Called with (q, k, v) as the engine is, and with what the attention asks for beyond them. Raises UnknownOption,
    MissingParameter, UseNotSupported, and the typed errors of the functions that the parameters go to.

    >>> attention = AttentionLibrary("SoftmaxAttention", "SlidingWindow", window=16)
    >>> q, k, v = (torch.randn(1, 50, 2, 32) for _ in range(3))
    >>> attention(q, k, v).shape
    torch.Size([1, 50, 2, 32])
    """

    def __init__(
        self,
        attn_type: str = "SoftmaxAttention",
        mask_type: str = "Causal",
        use_types: str = "Train",
        *,
        qkv_meta: Sequence[MetaTensor] | None = None,
        layout: str = "bshd",
        backend: str = "auto",
        scale: float | None = None,
        **parameters: Any,
    ) -> None:
        self.attention = _entry("attn_type", ATTENTIONS, attn_type)
        self.mask = _entry("mask_type", MASKS, mask_type)
        self.use_type = _use_type(use_types, (self.attention, self.mask))
        own, masks = _shares((self.attention, self.mask), parameters)
        arguments: dict[str, Any] = dict(self.attention.make(**own))
        self._scaled = arguments.pop("scaled", False)
        self._moves = self.use_type != "Train"
        self._mods: tuple[MaskMod | None, ScoreMod | None] = (
            self.mask.make(**masks),
            arguments.pop("score_mod", None),
        )
        # Where the first query stands: the same for all of a batch, or with a number for each sequence.
        self._places = {False: _Place(self._moves), True: _Place(self._moves, of_each=True)}
        self._arguments: dict[str, Any] = arguments | {"layout": layout, "backend": backend}
        self._scale = scale
        self._lock = threading.Lock()
        self._engines: dict[tuple[object, ...], AttentionEngine] = {}
        self._metas = qkv_meta
        self._own = None if qkv_meta is None else self._engine_of(qkv_meta)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any, **named: Any) -> Any:
        """The attention of q (B, S, H, D), k and v in the engine's layout; `more`: what the attention takes beyond.

        For "Prefill" and "Decode", lengths (len_q, len_kv, cu_len_q, cu_len_kv, with a block_table too) say of every
        sequence where its queries stand: they are its last ones.
        """
        of_each = self._moves and any(named.get(name) is not None for name in _LENGTHS)
        engine = self.engine(q, k, v, of_each=of_each)
        compose = self.attention.compose
        if not self._moves:
            return (
                engine(q, k, v, *more, **named)
                if compose is None
                else compose(engine, q, k, v, *more, **named)
            )
        length = 1 if engine.layout == "bshd" else 2
        with self._lock:  # the offset belongs to this call
            place = self._places[of_each]
            place.offset(_offsets(q, k, length, named) if of_each else k.shape[length] - q.shape[length])
            return (
                engine(q, k, v, *more, **named)
                if compose is None
                else compose(engine, q, k, v, *more, **named)
            )

    def engine(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, of_each: bool = False
    ) -> AttentionEngine:
        """The engine that calls with such tensors use; of_each: those that say how long every sequence is."""
        if self._own is not None and not of_each:
            return self._own
        key = (q.dtype, q.shape[-1], k.shape[-1], v.shape[-1], of_each)
        if key not in self._engines:
            metas = [meta_tensor(None, None, None, x.shape[-1], dtype=x.dtype) for x in (q, k, v)]
            self._engines[key] = self._engine_of(self._metas or metas, of_each)
        return self._engines[key]

    def source(self, dim: int = 64, dtype: torch.dtype = torch.float32, *, kernel: Kernel = "forward") -> str:
        """The text of a generated kernel; dim, dtype: of the tensors, where there was no qkv_meta."""
        return self._shown(dim, dtype).source(kernel=kernel)

    def explain(self, dim: int = 64, dtype: torch.dtype = torch.float32) -> Explanation:
        """What the compiler understood and decided; arguments as of `source`."""
        return self._shown(dim, dtype).explain()

    def __repr__(self) -> str:
        return f"AttentionLibrary({self.attention.name!r}, {self.mask.name!r}, {self.use_type!r})"

    @staticmethod
    def list() -> Listing:
        """Everything there is, to print or to go through."""
        return Listing((*ATTENTIONS.values(), *MASKS.values(), *CALLED.values()))

    def _shown(self, dim: int, dtype: torch.dtype) -> AttentionEngine:
        return self._own or self.engine(*(torch.empty(1, 1, 1, dim, dtype=dtype) for _ in range(3)))

    def _engine_of(self, metas: Sequence[MetaTensor], of_each: bool = False) -> AttentionEngine:
        scale = self._scale
        if scale is None and self._scaled:
            scale = 1.0 / math.sqrt(metas[0].dim)
        mask, score = self._mods
        arguments: dict[str, Any] = self._arguments | {"mask_mod": self._places[of_each].mask(mask)}
        if score is not None:
            arguments["score_mod"] = self._places[of_each].score(score)
        return AttentionEngine(metas, scale=scale, **arguments)


class Listing(tuple[Entry, ...]):
    """Entries of the library; `str()` is a table of them."""

    __slots__ = ()

    def __str__(self) -> str:
        lines: list[str] = []
        groups = {
            "attn_type": ATTENTIONS,
            "mask_type": MASKS,
            "attn_engine.library, called themselves": CALLED,
        }
        for title, names in groups.items():
            lines += [title, *(line for e in self if names.get(e.name) is e for line in _described(e)), ""]
        return "\n".join([*lines, f"backends, for all of them: {', '.join(NAMES)}"])


def _described(entry: Entry) -> tuple[str, ...]:
    return (
        f"  {entry}",
        *(f"      {line}" for line in textwrap.wrap(entry.summary, 100)),
        f"      {entry.paper}",
        f"      for {', '.join(entry.use_types)}",
    )


class _Place:
    """Where the first query stands: mods see positions counted from the first key."""

    def __init__(self, moves: bool, of_each: bool = False) -> None:
        self.moves = moves
        start: Any = torch.zeros(1, dtype=torch.int64) if of_each else 0

        def offset(value: int | torch.Tensor) -> None:
            nonlocal start
            start = value

        def moved_mask(mask: MaskMod) -> MaskMod:
            if of_each:
                return lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + start[b], kv_idx)
            return lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + start, kv_idx)

        def moved_score(mod: ScoreMod) -> ScoreMod:
            if of_each:
                return lambda score, b, h, q_idx, kv_idx: mod(score, b, h, q_idx + start[b], kv_idx)
            return lambda score, b, h, q_idx, kv_idx: mod(score, b, h, q_idx + start, kv_idx)

        self.offset, self._moved_mask, self._moved_score = offset, moved_mask, moved_score

    def mask(self, mask: MaskMod | None) -> MaskMod | None:
        return self._moved_mask(mask) if self.moves and mask is not None else mask

    def score(self, mod: ScoreMod) -> ScoreMod:
        return self._moved_score(mod) if self.moves else mod


_LENGTHS = ("len_q", "len_kv", "cu_len_q", "cu_len_kv", "block_table")


def _offsets(q: torch.Tensor, k: torch.Tensor, length: int, named: Mapping[str, Any]) -> torch.Tensor:
    """Keys less queries of every sequence: int64 (sequences,)."""

    def lengths(axis: str, x: torch.Tensor) -> torch.Tensor | int:
        if (places := named.get(f"cu_len_{axis}")) is not None:
            return places.diff()
        if (given := named.get(f"len_{axis}")) is not None:
            return given
        if axis == "kv" and (places := named.get("cu_len_q")) is not None:
            return places.diff()
        first = named.get(f"start_{axis}")
        return x.shape[length] - (0 if first is None else first)

    found = torch.as_tensor(lengths("kv", k), device=q.device) - lengths("q", q)
    return torch.atleast_1d(found).to(torch.int64)


def _entry(argument: str, entries: Mapping[str, Entry], name: object) -> Entry:
    entry = found(entries, name) if isinstance(name, str) else None
    if entry is None:
        known = ", ".join(map(repr, entries))
        raise UnknownOption(option=argument, value=name, where="AttentionLibrary", known=known)
    return entry


def _use_type(use: object, entries: Iterable[Entry]) -> str:
    known = ", ".join(map(repr, USE_TYPES))
    name = next((n for n in USE_TYPES if isinstance(use, str) and n.lower() == use.lower()), None)
    if name is None:
        raise UnknownOption(option="use_types", value=use, where="AttentionLibrary", known=known)
    for entry in entries:
        if name not in entry.use_types:
            raise UseNotSupported(use=name, entry=entry.name, known=", ".join(entry.use_types))
    return name


def _shares(
    entries: tuple[Entry, Entry], parameters: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that each of the two takes."""
    taken = [{n: v for n, v in parameters.items() if n in e.parameters} for e in entries]
    for name, value in parameters.items():
        if not any(name in share for share in taken):
            known = ", ".join(n for e in entries for n in e.parameters) or "none"
            raise UnknownOption(option=name, value=value, where=_calling(entries), known=known)
    for entry, share in zip(entries, taken, strict=True):
        for name, parameter in entry.parameters.items():
            if parameter.default is parameter.empty and name not in share:
                raise MissingParameter(parameter=name, entry=entry.name, paper=entry.paper)
    return taken[0], taken[1]


def _calling(entries: Iterable[Entry]) -> str:
    return f"AttentionLibrary({', '.join(repr(e.name) for e in entries)})"
