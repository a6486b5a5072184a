"""What a model's card says about merging: for each network, whether its calls are merged, and if not, why."""

from __future__ import annotations

from collections.abc import Iterable

from calotype_shared.schema.model_card import NetworkMerging
from calotype_worker.models.pipeline.network_calls import NetworkCalls
from calotype_worker.models.pipeline.probe import Recording

DETERMINISTIC = "merging is off in deterministic mode"


def merging_of(single: Recording, calls: NetworkCalls, problem: str) -> tuple[NetworkMerging, ...]:
    """`calls` after the rehearsal, `problem` the error that ended it, if any."""
    names = tuple(dict.fromkeys(call.component for call in single.calls))
    if single.changes:
        return all_alone(names, f"each run changes {single.changes}")
    if not calls.merging:
        return all_alone(names, DETERMINISTIC)
    verified = {network for network, outcome in calls.trust.counts if outcome == "verified"}
    found = []
    for name in names:
        reason = "; ".join(sorted({why for network, why in calls.trust.refused if network == name}))
        if not reason and name not in verified:
            reason = problem or "no two calls of the first runs could be merged"
        found.append(NetworkMerging(network=name, merged=name in verified, reason=reason))
    return tuple(found)


def all_alone(networks: Iterable[str], reason: str) -> tuple[NetworkMerging, ...]:
    """None of them merged, for one reason."""
    return tuple(NetworkMerging(network=name, merged=False, reason=reason) for name in networks)
