"""The choice of 4 or 8 bits for each matrix of a decoder, by how much 4 bits harm the model's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vlpack.calibration.sensitivity import Half
from vlpack.errors import OptionError, option
from vlpack.export.graph import Weight
from vlpack.export.weights import planned_bytes
from vlpack.quantize.allocation import Candidate, average_bits, choose
from vlpack.quantize.policy import Policy, PrecisionFacts, layer_and_name, make_policy


def _candidates(weights: Iterable[Weight], policy: Policy, facts: PrecisionFacts) -> list[Candidate]:
    """The matrices that can have 4 or 8 bits; their harm is set to 0, because it is not known yet."""
    found = []
    for weight in weights:
        layer, name = layer_and_name(weight.path)
        if layer is None or not weight.calibrated:
            continue
        storage = _with_eight_bits(policy, facts, {name: [layer]}).storage("text.linear", weight.path)
        many = planned_bytes([replace(weight, storage=storage)])
        found.append(Candidate(weight.path, weight.rows * weight.cols, planned_bytes([weight]), many, 0.0))
    return found


def check_reachable(weights: Iterable[Weight], policy: Policy, facts: PrecisionFacts, bits: float | None) -> None:
    """Checks that an average of ``bits`` bits per weight is possible; does nothing if ``bits`` is None.

    Raises:
        OptionError: 4 bits everywhere take more than the average already, or no matrix can have 8 bits.
    """
    if bits is None:
        return
    found = _candidates(weights, policy, facts)
    if not found:
        raise OptionError(
            f"{option('bits')} has no effect: no matrix outside of experts can have 8 bits here.",
            f"Leave {option('bits')} out.",
        )
    least = average_bits(found)
    if bits < least:
        raise OptionError(
            f"{option('bits', format(bits, 'g'))} is less than what 4 bits take here with their scales: {least:.2f}.",
            f"Choose a larger number, or leave {option('bits')} out.",
        )


def spend_bits(
    policy: Policy, facts: PrecisionFacts, weights: Iterable[Weight], harms: Mapping[Half, float], bits: float
) -> Policy:
    """The policy that gives 8 bits to the matrices that need them most, within an average number of bits per weight.

    The harm that was measured for half a layer is divided among its matrices in proportion to their sizes.

    Args:
        policy: policy with 4 bits everywhere.
        facts: facts about the model that the policy depends on.
        weights: weights of the package under that policy.
        harms: harm of 4 bits in each half of a layer, as KL divergence in nats per token.
        bits: average number of bits per weight, scales included.
    """
    found = _candidates(weights, policy, facts)
    halves = {one.path: _half(one.path) for one in found}
    sizes = dict.fromkeys(halves.values(), 0)
    for one in found:
        sizes[halves[one.path]] += one.weights
    rated = [replace(one, harm=harms[halves[one.path]] * one.weights / sizes[halves[one.path]]) for one in found]
    layers: dict[str, list[int]] = {}
    for path in choose(rated, bits):
        layer, name = layer_and_name(path)
        assert layer is not None, "candidates are in layers"
        layers.setdefault(name, []).append(layer)
    return _with_eight_bits(policy, facts, {name: sorted(numbers) for name, numbers in sorted(layers.items())})


def _half(path: str) -> Half:
    layer, name = layer_and_name(path)
    assert layer is not None, "candidates are in layers"
    module = name.partition(".")[0]
    return Half(layer, "self_attn" if module == "linear_attn" else module)


def _with_eight_bits(policy: Policy, facts: PrecisionFacts, layers: Mapping[str, list[int]]) -> Policy:
    return make_policy(policy.precision, policy.provider, replace(policy.options, eight_bits=layers), facts)
