"""Combine the adapters of a request on their model, and save the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from petune.adapters.format import TENSOR_FILE
from petune.adapters.lora_products import is_plain_lora, layers_in_parts, lora_factors, with_rank
from petune.base.errors import UsageError
from petune.base.metric import Metric
from petune.serving.average.ingredients import check_alike
from petune.serving.average.record import Averaged, average_metadata, averaged_from, shown_coefficients
from petune.serving.average.request import AVERAGE, NO_HEAD, AverageRequest
from petune.serving.average.slot import AdapterSlot
from petune.serving.average.soup import Combined, Mixture, check_in_range, combine_products, greedy_choice
from petune.serving.average.start import continued_start, have_random_starts, start_of
from petune.serving.average.val_scores import main_metric, val_scorer
from petune.serving.predict import Predictor


class Averaging:
    """One call of `average_adapters`, with the model.

    Args:
        request: The arguments.
        slot: The model, with an adapter on it.
        predictor: For val.
    """

    def __init__(self, request: AverageRequest, slot: AdapterSlot, predictor: Predictor | None) -> None:
        self.request = request
        self.slot = slot
        self.predictor = predictor
        with_heads = request.head == AVERAGE
        self.states = [slot.values_of(i.saved, with_head=with_heads) for i in request.ingredients]
        if request.head == "keep":
            self.base_state = slot.values_of(request.base.saved)
        parts = slot.parts()
        self.tuned_keys = {key for key, (kind, _) in parts.items() if kind == "tuned"}
        self.buffer_keys = {key for key, (kind, _) in parts.items() if kind == "buffer"}
        self.head_keys = {key for key, (_, in_head) in parts.items() if in_head}
        config = request.base.saved.config
        self.is_lora = is_plain_lora(config, self.tuned(self.states[0])) and not request.by_factors
        self.layers = self._layers_in_parts() if self.is_lora else []
        self.is_low_rank = not self.is_lora and any(".lora_A" in key for key in self.tuned_keys)
        if not self.is_lora:
            check_alike(request.ingredients, heads_alike=with_heads, by_products=False)
        if request.rank is not None and not self.is_lora:
            raise UsageError(
                f"rank is for the products of LoRA, and {config['tuner']} is combined value by value. Leave it out"
            )
        if request.by_factors and not is_plain_lora(config, self.tuned(self.states[0])):
            raise UsageError(
                f"by_factors is for LoRA, and this is {config['tuner']}. Leave it out", cli_hint="Drop --by-factors"
            )
        if not self.tuned_keys and request.mixture.needs_start:
            raise UsageError(
                f"{config['tuner']} tunes nothing but the classifier, which has no task vector. Use uniform"
            )

    def tuned(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tuned tensors of a state."""
        return {key: state[key] for key in self.tuned_keys}

    def _layers_in_parts(self) -> list[str]:
        """Return the layers to wrap as wholes, because some adapter changes q, k or v of them alone; else none.

        Raises:
            UsageError: One is no linear layer.
        """
        found = [
            layers_in_parts(i.saved.config, self.tuned(state))
            for i, state in zip(self.request.ingredients, self.states, strict=True)
        ]
        layers = next(filter(None, found), [])
        for path in layers:
            module = self.slot.attachment.model.get_submodule(path)
            if not isinstance(getattr(module, "base_layer", module), nn.Linear):
                raise UsageError(
                    f"{path} holds q, k and v as one parameter, and the average of LoRA on parts of it has no form in "
                    "PEFT. Combine A and B one by one: by_factors=True",
                    cli_hint="The flag is --by-factors",
                )
        return layers

    def run(self, data_dir: Path | None, batch_size: int) -> Averaged:
        """Combine the adapters and write the result."""
        request = self.request
        mixture, count = request.mixture, len(request.ingredients)
        coefficients, vals, val, metric = shown_coefficients(mixture, count), None, None, None
        chosen = tuple(range(count))
        if mixture.algorithm == "greedy":
            metric = main_metric(request.base)
            chosen, vals, val = self.choose(metric, data_dir, batch_size)
            coefficients = tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(count))
        combined = self.combine(chosen)
        notes = self.notes(chosen)  # they try other starts on the model
        self.put(combined)
        summary = Averaged(
            output=str(request.output),
            algorithm=mixture.algorithm,
            method=str(request.base.metadata.get("method", request.base.saved.config["tuner"])),
            adapters=averaged_from(request.ingredients, coefficients, vals),
            metric=metric,
            val=val,
            rank=combined.rank,
            errors=combined.errors,
        )
        with_head = request.head != NO_HEAD
        metadata = average_metadata(
            request.base, request.ingredients, summary, mixture, with_head=with_head, layers=self.layers
        )
        self.slot.save(str(request.output), metadata, with_head=with_head)
        size = (request.output / TENSOR_FILE).stat().st_size
        return replace(summary, notes=notes, bytes=size)

    def choose(
        self, metric: Metric, data_dir: Path | None, batch_size: int
    ) -> tuple[tuple[int, ...], list[float | None], float | None]:
        """Return which adapters a greedy soup takes, the value of each on val, and that of the soup."""
        if self.predictor is None:
            raise UsageError("greedy evaluates the model that the runs record. Leave model out")
        value = val_scorer(self.predictor, self.request.base, metric, data_dir, batch_size)

        def value_of(chosen: tuple[int, ...]) -> float | None:
            self.put(self.combine(chosen))
            return value()

        singles = [value_of((i,)) for i in range(len(self.states))]
        if all(v is None for v in singles):
            raise UsageError(f"{metric.label} is undefined on val, so it chooses nothing. Use the algorithm uniform")
        chosen, score = greedy_choice([metric.score(v) for v in singles], lambda some: metric.score(value_of(some)))
        return chosen, singles, score if metric.higher_is_better else -score

    def combine(self, chosen: tuple[int, ...]) -> Combined:
        """Combine some of the adapters, which all have the mean's weight if there are fewer than all."""
        mixture, states = self.request.mixture, [self.states[i] for i in chosen]
        if len(chosen) < len(self.states) or mixture.algorithm == "greedy":
            mixture = replace(mixture, shares=(1 / len(chosen),) * len(chosen))
        rest = [{key: t for key, t in state.items() if key not in self.tuned_keys} for state in states]
        others = mixture.others(rest, self.buffer_keys)
        if self.request.head == "keep":
            others |= {key: self.base_state[key] for key in self.head_keys}
        if self.is_lora:
            combined = self._combine_products(mixture, chosen)
        else:
            combined = Combined(
                mixture.values([self.tuned(s) for s in states], self._start() if mixture.needs_start else {})
            )
        check_in_range(values := {**combined.values, **others})
        return replace(combined, values=values)

    def put(self, combined: Combined) -> None:
        """Put combined values on the model; a LoRA of another rank is attached anew."""
        options = self.request.base.saved.config["config"]
        if combined.rank is not None:
            options = with_rank(options, combined.rank, self.layers)
        if self.slot.attachment.tuner.config.plain() != options:
            self.slot.exchange(options)
        self.slot.put(combined.values)

    def notes(self, chosen: Sequence[int]) -> tuple[str, ...]:
        """Return what to know about the result."""
        request, notes = self.request, []
        if self.buffer_keys & self.head_keys and len(chosen) > 1 and request.head == AVERAGE:
            notes.append(
                "the statistics of BatchNorm are the mean of those of the adapters; they were not measured anew"
            )
        if self.is_low_rank and len(chosen) > 1:
            notes.append("A and B were combined one by one, which is not the combination of the changes B·A")
        is_plain = not self.is_lora and self.tuned_keys and not request.mixture.needs_start and len(chosen) > 1
        taken = [request.ingredients[i] for i in chosen]
        if is_plain and have_random_starts(self.slot, taken):
            known = all(i.seed is not None for i in taken)
            fact = "started from different random values" if known else "do not record what they started from"
            notes.append(
                f"the adapters {fact}, and the average of different random starts may be worse than each of them: "
                "evaluate both. Runs that continue one adapter (petune run --from) have a start in common"
            )
        if request.head == NO_HEAD:
            notes.append(
                "the result has no classifier, so petune eval, predict and export have none to run. Train one for it "
                "(petune run --from), or load it into a model that has one (petune.load)"
            )
        return tuple(notes)

    def _start(self) -> dict[str, Tensor]:
        request = self.request
        continued = continued_start(request.ingredients, request.start, by_products=False)
        if continued is not None:
            values = self.slot.values_of(continued.saved, with_head=False)
            return {key: values[key] for key in self.tuned_keys}
        return start_of(self.slot, request.ingredients, [self.tuned(state) for state in self.states])

    def _combine_products(self, mixture: Mixture, chosen: Sequence[int]) -> Combined:
        ingredients = self.request.ingredients
        adapters = [lora_factors(ingredients[i].saved.config, self.tuned(self.states[i])) for i in chosen]
        start = None
        if mixture.needs_start:
            continued = continued_start(ingredients, self.request.start, by_products=True)
            if continued is not None:
                values = self.slot.values_of(continued.saved, with_head=False)
                start = lora_factors(continued.saved.config, self.tuned(values))
            elif self.request.base.saved.config["config"].get("init_lora_weights", True) is False:
                raise UsageError(
                    "with init_lora_weights=false LoRA starts with random changes, so these runs have no start in "
                    "common. Use the algorithm uniform or greedy"
                )
        return combine_products(mixture, adapters, start, self.request.rank)
