"""A trained run that another run loads: the reference of a proxy or of scoring, or the model of an evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from megatron_doremi.config import Config, GPTConfig, gpt_config, states_shape
from megatron_doremi.data.reference_losses import ReferenceLosses
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.mixture.controller import MixtureController
from megatron_doremi.mixture.reference import OnlineReference, TrainedModel
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.phases.model_checks import read_model
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.phases.to_come import INITIAL_MODEL, LOADED_RUN, LOSSES, REFERENCE_RUN
from megatron_doremi.plan import RunPlan
from megatron_doremi.settings import EVALUATE, PROXY
from megatron_doremi.shapes import RESETS, Shape

# Fields of a shape that no model flag states.
_OF_DOCUMENTS = (*RESETS, "eod")
_OTHER_RESETS = (
    "resets positions or attention at other places than the proxy: the excess loss then measures what it sees of "
    "earlier documents as well"
)
# Fields of a shape that a run chooses although it starts from a model.
_OF_A_NEW_RUN = ("make_vocab_size_divisible_by", "init_method_std")


def scores_online(config: Config, controller: MixtureController) -> bool:
    """Whether a training run scores its batches with a reference as it trains."""
    return controller.needs_reference and config.doremi.online


def reads_reference_losses(config: Config, controller: MixtureController) -> bool:
    """Whether a run reads recorded reference losses."""
    return controller.needs_reference and not config.doremi.online


def read_reference(config: Config, data: RunData, to_come: Collection[str] = ()) -> TrainedModel:
    """Finds and checks the reference of a proxy or of scoring.

    Args:
        to_come: see `inputs_to_come`.
    """
    folder = Path(config.doremi.reference_folder)
    if REFERENCE_RUN in to_come:
        return _stand_in(config, data, folder, REFERENCE_RUN)
    step = config.doremi.reference_step
    return read_model(folder, REFERENCE_RUN, data, config, step, needs_all_steps=True, forward_only=True)


def loaded_warnings(config: Config, shape: Shape, loaded: TrainedModel | None) -> list[str]:
    """Warnings about a model that a run scores with: one that never saw such long windows, and a reference that differs
    from the DoReMi paper's, which has the proxy's own shape and was trained on a fixed mixture.

    Args:
        shape: of the proxy; of scoring and of an evaluation, that of the loaded model.
        loaded: the reference, or the model of an evaluation; None: no model is loaded.
    """
    if loaded is None:
        return []
    if config.data.phase == EVALUATE:
        return _window_warnings(config, loaded, f"{LOADED_RUN} {config.run.load}")
    subject = f"{REFERENCE_RUN} {config.doremi.reference_load}"
    return _window_warnings(config, loaded, subject) + _reference_warnings(shape, loaded, subject)


def _window_warnings(config: Config, loaded: TrainedModel, subject: str) -> list[str]:
    """A warning where windows are longer than any that a model with rotary positions was made for: it computes losses
    at any length. Models with a limit are refused."""
    seen, asked = loaded.shape.max_positions, config.data.seq_length
    if seen is None or seen >= asked:
        return []
    return [
        f"{subject} was made for windows of up to {seen:,} tokens, and --seq-length is {asked:,}: it never saw later "
        f"positions, and its losses there may be far too high; give --seq-length {seen}"
    ]


def _reference_warnings(shape: Shape, reference: TrainedModel, subject: str) -> list[str]:
    lines = list[str]()
    if reference.phase == PROXY:
        lines.append(f"{subject} is a proxy, which DRO trained: DoReMi's reference is a run of --phase reference")
    if not isinstance(shape, GPTConfig) or not isinstance(reference.shape, GPTConfig):
        if shape != reference.shape:
            effect = "the excess loss then measures the difference between the models as well"
            lines.append(f"{subject} is another model than the proxy: {effect}")
        return lines
    # Of the shape, what decides how good the model can be.
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels")
    differing = [
        f"{name} {getattr(reference.gpt, name):,} (proxy: {getattr(shape, name):,})"
        for name in names
        if getattr(reference.gpt, name) != getattr(shape, name)
    ]
    if differing:
        effect = "the excess loss then measures the difference in size as well"
        lines.append(f"{subject} has another shape than the proxy, {', '.join(differing)}: {effect}")
    if any(getattr(reference.gpt, name) != getattr(shape, name) for name in _OF_DOCUMENTS):
        lines.append(f"{subject} {_OTHER_RESETS}")
    return lines


def recorded_warnings(gpt: GPTConfig, losses: ReferenceLosses) -> list[str]:
    """A warning if recorded losses are of a reference that resets otherwise than the proxy `gpt`; folders of earlier
    versions do not say."""
    resets = [(getattr(losses.scores_file, name), getattr(gpt, name)) for name in RESETS]
    if all(recorded in (None, own) for recorded, own in resets):
        return []
    return [f"the reference of {LOSSES} {losses.folder} {_OTHER_RESETS}"]


def read_loaded(config: Config, data: RunData, to_come: Collection[str] = ()) -> TrainedModel:
    """Finds and checks the model of scoring or of an evaluation; `to_come`: see `inputs_to_come`.

    The model flags apply only in a dry run: they give the shape of a run that does not exist yet.
    """
    if config.data.phase != EVALUATE:
        loaded, flag = read_reference(config, data, to_come), REFERENCE_RUN
    else:
        folder, flag = Path(config.run.load_folder), LOADED_RUN
        if flag in to_come:
            loaded = _stand_in(config, data, folder, flag)
        else:
            loaded = read_model(folder, flag, data, config, config.run.load_step, forward_only=True)
    if states_shape(config.model):
        raise_if_any(_shape_differences(config, loaded, flag))
    return loaded


def read_initial(config: Config, data: RunData, to_come: Collection[str] = ()) -> TrainedModel | None:
    """Finds and checks the model of --init-from; None without the flag. `to_come`: see `inputs_to_come`."""
    if not config.run.init_from:
        return None
    folder = Path(config.run.init_folder)
    if INITIAL_MODEL in to_come:
        return _stand_in(config, data, folder, INITIAL_MODEL)
    model = read_model(folder, INITIAL_MODEL, data, config, config.run.init_step, same_domains=False)
    if states_shape(config.model):
        raise_if_any(_shape_differences(config, model, INITIAL_MODEL, _OF_A_NEW_RUN))
    return model


def initial_shape(config: Config, model: TrainedModel) -> GPTConfig:
    """The shape of a run that starts from a model: the model's, at this run's window length and padding."""
    gpt = replace(model.gpt, make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by)
    # A table of learned positions keeps its length.
    return replace(gpt, max_positions=config.data.seq_length) if gpt.position_embedding_type == "rope" else gpt


def _stand_in(config: Config, data: RunData, folder: Path, flag: str) -> TrainedModel:
    """The stand-in of a dry run for a run that does not exist yet; its weights are never read."""
    if not states_shape(config.model):
        rule, remedy = "a run, or for a dry run the shape of one to come", "train it first, or give its model flags"
        raise ConfigError(Fault(f"{flag} {folder}", "does not exist", rule, remedy))
    shape = gpt_config(config.model, config.data.seq_length, data.vocab_size)
    return TrainedModel(shape, None, folder, folder, {}, folder, 0, config.data.global_batch_size)


def _shape_differences(config: Config, loaded: TrainedModel, flag: str, ignored: Collection[str] = ()) -> list[Fault]:
    """Faults of model flags that contradict the loaded model; its vocabulary and window length are not compared."""
    if not isinstance(loaded.shape, GPTConfig):
        rule = f"Transformers runs the {loaded.shape.class_name} of {flag}, which has a shape of its own"
        return [Fault("model flags", "have no effect", rule, "leave them out")]
    stated = asdict(gpt_config(config.model, loaded.gpt.max_positions, loaded.gpt.vocab_size))
    rule, remedy = f"the shape of the run of {flag}", "leave out the model flags, or name another run"
    return [
        Fault("model flags", f"{name} {stated[name]}", f"{rule}: {name} {value}", remedy)
        for name, value in asdict(loaded.gpt).items()
        if stated[name] != value and name not in (*ignored, *_OF_DOCUMENTS)
    ]


def make_reference(plan: RunPlan, run: TrainedModel | None, context: ParallelContext) -> OnlineReference | None:
    """The frozen reference on the proxy's layout and in its precision; None if the losses are on disk or not needed."""
    if run is None:
        return None
    return OnlineReference(run, context, plan.dtype, plan.batch_shape, plan.frozen_execution)
