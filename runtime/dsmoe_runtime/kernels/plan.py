"""The vocabulary of choices: what a call looks like, and how its kernels are cut."""

from __future__ import annotations

from dataclasses import dataclass

REGIMES = ("pairs", "scan", "sorted")


@dataclass(frozen=True)
class Shape:
    """One call of the experts: T tokens, hidden H, width I, E experts, K of them a token; `dtype` as in "bfloat16".

    shared: shared experts as wide as a routed one, which a layer's launches for few tokens compute, too.
    """

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    dtype: str
    shared: int = 0


@dataclass(frozen=True)
class Tile:
    """One kernel's block: rows (tokens), columns (of weights), depth, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    regime: "pairs": a program per (token, expert) pair, no sort; "scan": a program per expert that finds its own rows
        among the ids; "sorted": ids are sorted first, then a grouped GEMM over tiles of `up.block_m` rows.
    up, down: tiles of gate-and-up (block_n columns of each) and of down; both have the same block_m.

    For "sorted" only:
    group: row tiles that run beside each other before the next columns.
    half: a row tile at most half full is computed at half height.
    ahead: bytes of each row of weights that the L2 is asked for before the kernel may begin; 0: none.
    tma_rows: down reads the hidden state by the copy engine, too.
    resident: programs per multiprocessor, each of which walks over many tiles; 0: one program a tile.
    specialised: kernels some of whose warps copy while others multiply, cut in one way whatever the tiles say, but for
        their 128 rows; see `kernels.specialised`.
    """

    regime: str
    up: Tile
    down: Tile
    group: int = 8
    half: bool = False
    ahead: int = 0
    tma_rows: bool = True
    resident: int = 0
    specialised: bool = False
