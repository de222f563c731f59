"""What a result says of the links: what its placement sends over them, and what of it was saved."""

from __future__ import annotations

from gemopt.documents import Part
from gemopt.words import short


class BytesSaved(Part):
    """What a placement with fewest bytes between nodes saves, against the one with least compute that was found.

    Microseconds and bytes over all steps and layers, before and now. compute_slack: by what part compute might grow.
    fullest: through the fullest port between nodes (of links between pairs: the fullest link of all).
    """

    compute_slack: float
    compute_us: tuple[float, float]
    cross_node_bytes: tuple[float, float]
    fullest: tuple[float, float]

    def summary(self) -> str:
        """One line for people."""
        pairs = (self.cross_node_bytes, self.fullest, self.compute_us)
        sent, fullest, compute = (f"{100 * (now / before - 1 if before else 0.0):+z.1f} %" for before, now in pairs)
        return (
            f"{sent} of bytes between nodes, {fullest} through the fullest link there, for {compute} of compute "
            f"(at most {100 * self.compute_slack:+.3g} %), against the placement found without links"
        )


class LinksReport(Part):
    """What the exchanges of a placement take over all steps and layers; `exposed_us` of it a step waits for.

    The first fields say what was assumed: see `gemopt.links.Exchange`. Bytes are those of dispatch and combine
    together. saved: with fewest bytes between nodes asked for.
    """

    topology: str | None
    once_per: str
    senders: str
    overlap: bool
    dispatch_bytes: int
    combine_bytes: int
    dispatch_us: float
    combine_us: float
    exposed_us: float
    cross_node_bytes: float
    cross_rank_bytes: float
    fullest_bytes: dict[str, float]
    fullest_port: str
    saved: BytesSaved | None = None

    def summary(self, num_steps: int) -> str:
        """A line for people, and one of what was saved."""
        sent = (self.dispatch_us + self.combine_us) / num_steps
        hidden = f", {self.exposed_us / num_steps:.1f} us of it exposed" if self.overlap else ""
        return (
            f"{sent:.1f} us per step to exchange tokens over {self.topology or 'the links'}{hidden}: once per "
            f"{self.once_per}, senders {self.senders}, {short(self.cross_node_bytes / 1e9)} GB between nodes, "
            f"fullest port {self.fullest_port}"
        ) + ("" if self.saved is None else f"\n{self.saved.summary()}")
