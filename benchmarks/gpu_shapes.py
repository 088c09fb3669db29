"""The routed experts that the GPU benchmarks measure, with the goals and the best peers' published figures."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = (1, 16, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    """A layer's routed experts, and the published figures for the numbers of tokens in TOKENS: microseconds."""

    hidden: int
    width: int
    experts: int
    top_k: int
    goal: tuple[float, ...] = ()
    peer: tuple[float, ...] = ()  # the best peer, in the same way on the same kind of GPU

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * 2

    def size(self, distinct: float, tokens: int) -> float:
        """Bytes that must move: the experts hit, x and y."""
        return distinct * self.expert_bytes + 4 * tokens * self.hidden

    def flop(self, tokens: int) -> float:
        return 6.0 * self.hidden * self.width * self.top_k * tokens


SHAPES = {
    "16B": Shape(2048, 1408, 64, 6, (29, 205, 266, 278, 720, 2600), (36.4, 210.4, 278.1, 308.8, 934.4, 2682.7)),
    # The paper says 8/3 * 1280 / 4 = 853.3; the peers ran 864, a multiple of 16 bytes, and so does this.
    "2B": Shape(1280, 864, 63, 7, (15, 88, 106, 112, 310, 1200), (22.7, 100.5, 127.3, 148.1, 398.1, 1331)),
    "Qwen3-30B": Shape(2048, 768, 128, 8, (22, 192, 285, 300, 560, 2000), (27.4, 197.5, 293.7, 331.6, 785.2, 2153.5)),
    "145B": Shape(4096, 1408, 128, 12, (103, 810, 1025, 1090, 2900, 10600), (108.7, 813.8, 1034, 1156, 3534, 11694)),
    "V3": Shape(7168, 2048, 256, 8, (173, 1990, 4420, 5350, 7200, 19000), (182.8, 1994, 4431, 5454, 8830, 23742)),
    "tiny": Shape(64, 32, 8, 2),  # to try the script
}
