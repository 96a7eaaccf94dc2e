"""The choice of 4 or 8 bits for each matrix of a decoder, by what rounding it costs the model."""

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
    """The matrices that may have 4 or 8 bits, of no known harm."""
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
    """Raises an OptionError where 4 bits everywhere are more than ``bits`` already, or there is nothing to choose."""
    if bits is None:
        return
    found = _candidates(weights, policy, facts)
    if not found:
        raise OptionError(f"{option('bits')} has no effect: only experts could have 8 bits here.", "Leave it away.")
    least = average_bits(found)
    if bits < least:
        raise OptionError(
            f"{option('bits', format(bits, 'g'))} is less than what 4 bits take here with their scales: {least:.2f}.",
            f"Give more, or leave {option('bits')} away.",
        )


def spend_bits(
    policy: Policy, facts: PrecisionFacts, weights: Iterable[Weight], harms: Mapping[Half, float], bits: float
) -> Policy:
    """The policy by which a decoder has so many bits per weight on average, where they help most.

    A half layer's harm is its matrices' by their numbers of weights.

    Args:
        policy: of 4 bits everywhere.
        facts: of the model.
        weights: of the package by that policy.
        harms: of 4 bits in each half of a layer.
        bits: per weight, scales included.
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
    return Half(layer, name.partition(".")[0])


def _with_eight_bits(policy: Policy, facts: PrecisionFacts, layers: Mapping[str, list[int]]) -> Policy:
    return make_policy(policy.precision, policy.provider, replace(policy.options, eight_bits=layers), facts)
