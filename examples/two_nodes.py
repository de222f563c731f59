"""Two nodes of four GPUs: what the network between them adds to a step, and what a placement that knows it saves.

Each node serves one kind of request, and each kind has experts of its own that it goes to more often. A placement that
looks at loads alone scatters them over both nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gemopt
from gemopt.evaluate import Evaluation
from gemopt.formats.tables.kernel import Unit, read_table
from gemopt.formats.tables.kernel import equal as equal_ranks
from gemopt.links import Exchange
from gemopt.traces.tokens import Tokens

DATA = Path(gemopt.__file__).parent / "data"
TOPOLOGY = "2x4-shared-eth100-nvlink"  # one 100 Gb/s NIC for the four GPUs of a node
STEPS, LAYERS, EXPERTS, RANKS, TOP_K, TOKENS = 48, 2, 32, 8, 4, 128
PREFERRED = 12.0


def recorded(seed: int = 0) -> gemopt.Traces:
    """Token by token: tokens of ranks 0 to 3 prefer one half of the experts, those of ranks 4 to 7 the other."""
    rng = np.random.default_rng(seed)
    rank_N = np.tile(np.arange(TOKENS) * RANKS // TOKENS, STEPS)
    ids = np.empty((len(rank_N), LAYERS, TOP_K), np.int64)
    for layer in range(LAYERS):
        half_E = rng.permutation(EXPERTS) % 2
        logits_NE = np.log(PREFERRED) * (half_E == rank_N[:, None] // 4) + 0.5 * rng.standard_normal(EXPERTS)
        ids[:, layer] = np.argsort(-(logits_NE + rng.gumbel(size=logits_NE.shape)), axis=1)[:, :TOP_K]
    step_N = np.repeat(np.arange(STEPS), TOKENS)
    counts = np.zeros((STEPS, LAYERS, EXPERTS), np.int64)
    np.add.at(counts, (step_N[:, None, None], np.arange(LAYERS)[:, None], ids), 1)
    return gemopt.Traces(counts=counts, top_k=TOP_K, tokens=Tokens(ids=ids, step_of_token=step_N, source_rank=rank_N))


def main() -> dict[str, Evaluation]:
    """Experts in order, and the answers that heed loads alone and links too, all scored with the links."""
    table = read_table(DATA / "h100_vllm_gptoss20b_ep8.csv", unit=Unit.GROUP_TOKENS, top_k=TOP_K, ep=RANKS)
    profile, whole = equal_ranks(table, RANKS), recorded()
    past, later = whole.split(0.5)
    links: dict[str, Any] = {
        "topology": TOPOLOGY,
        "exchange": Exchange(once_per="node", dispatch_bytes=5760, combine_bytes=5760),  # 2880 activations in bf16
    }
    search: dict[str, Any] = {"solver": "local-search", "time_limit": 4.0, "patience": 3}
    found = {
        "contiguous": gemopt.solve(profile, past, solver="linear"),
        "loads alone": gemopt.solve(profile, past, **search),
        "loads and links": gemopt.solve(profile, past, **search, **links),
    }
    scores = {name: gemopt.evaluate(result.placement, profile, later, **links) for name, result in found.items()}
    for name, score in scores.items():
        steps, sent = later.num_steps, score.communication.cross_node_bytes
        print(f"{name:<15} {score.objective_us / steps:4.0f} us per step, {score.compute_us / steps:4.0f} us of it "
              f"computing; {sent / steps / 1e6:4.2f} MB between the nodes")  # fmt: skip
    return scores


if __name__ == "__main__":
    main()
