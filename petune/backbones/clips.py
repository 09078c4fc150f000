"""Let any model take clips as they leave the data: (batch, frames, channels, height, width).

Legend: B batch, T frames, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from petune.base.arguments import check_arguments
from petune.base.errors import AttachError, UsageError
from petune.sites.forward import black_image, forward_of, meta_output
from petune.sites.hooked import removed_after
from petune.sites.input_size import channels_of, image_sizes_of
from petune.sites.input_spec import InputSpec
from petune.sites.logits import logits_of

ClipForm = Literal["frames first", "channels first", "logits of frames", "frame by frame"]
"""What a model takes: (B, T, C, H, W); (B, C, T, H, W); (B, T, C, H, W) to return logits of each frame, which are
averaged; or the frames as images, of which the same is done."""
FORMS: tuple[ClipForm, ...] = ("frames first", "channels first", "logits of frames", "frame by frame")


def take_clips(model: nn.Module, num_frames: int, *, image_size: int | None = None) -> nn.Module:
    """Let a model take clips (batch, frames, channels, height, width), whatever its own forward takes.

    A model that takes them as they are (transformers' video models) needs nothing. A model of videos with the channels
    first (torchvision's) gets them permuted. A model of images gets every frame as an image, and returns the mean of
    the frames' logits, as does one that returns logits of every frame. Names of modules and tensors stay as they are,
    so that an adapter of a run on clips is loaded by `petune.load(petune.take_clips(model, 16), "RUN/adapter")`.

    Args:
        model: A classifier. Its forward gets two hooks, in place of those of an earlier call.
        num_frames: Frames of a clip.
        image_size: Side of the frames in pixels, for a model that does not tell it.

    Returns:
        The same model.

    Raises:
        AttachError: Its forward runs on no form of such clips, or it does not tell the size of its images.
        UsageError: An argument has another type or is below 1.
    """
    size = (image_size, int | None)
    check_arguments("petune.take_clips", model=(model, nn.Module), num_frames=(num_frames, int), image_size=size)
    if num_frames < 1 or (image_size is not None and image_size < 1):
        raise UsageError("petune.take_clips: num_frames and image_size must be at least 1")
    set_clip_form(model, num_frames, image_size)
    return model


def set_clip_form(model: nn.Module, num_frames: int, image_size: int | None = None) -> ClipForm:
    """Do what `take_clips` does, and return what the model itself takes.

    Raises:
        AttachError: See `take_clips`.
    """
    given = image_size and [(channels_of(model), image_size, image_size)]
    earlier = _without_hooks(model)
    try:
        form = _first_form(model, num_frames, given or image_sizes_of(model))
    except AttachError:
        for hooks, own in earlier:
            hooks.update(own)
        raise
    _use(model, form, num_frames)
    model.num_frames = num_frames  # type: ignore[assignment]
    return form


def _without_hooks(model: nn.Module) -> list[tuple[Any, dict[int, Any]]]:
    """Remove the hooks of an earlier call, also from a copy of the model, and return them with where they were."""
    own = {_channels_first, _frames_as_images, _mean_of_frames, _rows_of_logits}
    removed = []
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        found = {key: hook for key, hook in hooks.items() if getattr(hook, "func", hook) in own}
        for key in found:
            del hooks[key]
        removed.append((hooks, found))
    return removed


def _first_form(model: nn.Module, num_frames: int, images: Sequence[tuple[int, ...]]) -> ClipForm:
    """Return the form for the first size of images that the model runs on; the error is that of the last."""
    *others, last = images
    for image in others:
        with contextlib.suppress(AttachError):
            return _form_of(model, num_frames, image)
    return _form_of(model, num_frames, last)


def _form_of(model: nn.Module, num_frames: int, image: tuple[int, ...]) -> ClipForm:
    clips = InputSpec.of_size((num_frames, *image))
    failures = {form: _failure(model, form, num_frames, clips) for form in FORMS}
    forms = [form for form in FORMS if failures[form] is None]
    if not forms:
        reasons = "; ".join(f"{form}: {reason}" for form, reason in failures.items())
        raise AttachError(
            f"{type(model).__name__} takes no clips of {num_frames} frames ({clips.text}), nor their frames as images. "
            f"Use the number of frames and the size that it was made for. It failed with {reasons}"
        )
    if num_frames == image[0] and forms[:2] == ["frames first", "channels first"]:
        forms = [_form_of_longer(model, num_frames, image)]
    _refuse_unseen_frames(model, forms[0], num_frames, clips)
    return forms[0]


def _refuse_unseen_frames(model: nn.Module, form: ClipForm, num_frames: int, clips: InputSpec) -> None:
    """Refuse a number of frames whose last ones no kernel of the model's first convolution over time covers."""
    inputs: list[tuple[nn.Conv3d, int]] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Conv3d):
            inputs.append((layer, args[0].shape[-3]))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, nn.Conv3d)]
    if not hooks:
        return
    try:
        failure = _failure(model, form, num_frames, clips)
    finally:
        for hook in hooks:
            hook.remove()
    if failure is not None or not inputs:
        return
    layer, length = inputs[0]
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    if not isinstance(padding, int):
        return
    reach = layer.dilation[0] * (kernel - 1)
    covered = (length + 2 * padding - reach - 1) // stride * stride + reach + 1 - padding
    if covered < length:
        raise AttachError(
            f"{type(model).__name__} joins {stride} frames at a time and would not see the last of {num_frames} frames"
        )


def _form_of_longer(model: nn.Module, num_frames: int, image: tuple[int, ...]) -> ClipForm:
    """Tell frames from channels, if there are as many, by clips of twice the length."""
    clips = InputSpec.of_size((2 * num_frames, *image))
    forms = [form for form in FORMS[:2] if _failure(model, form, 2 * num_frames, clips) is None]
    if len(forms) != 1:
        raise AttachError(
            f"{type(model).__name__} runs on clips of {num_frames} frames and {image[0]} channels with either first"
        )
    return forms[0]


def _failure(model: nn.Module, form: ClipForm, num_frames: int, clips: InputSpec) -> str | None:
    """Return why a model does not return one row of logits for each clip that it gets in a form; None if it does."""
    with _used(model, form, num_frames):
        try:
            rows = 2
            output = meta_output(model, clips, rows)
        except Exception:  # see `petune.sites.forward.dry_forward`
            try:
                rows = 1
                output = forward_of(model, black_image(model, clips))
            except Exception as error:  # whatever the model's own code raises
                return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    shape = tuple(logits_of(output).shape)
    is_row = len(shape) == 2 or (form == "frames first" and len(shape) == 3 and shape[1] == 1)
    return None if is_row and shape[0] == rows else f"it returns {shape} for {rows} clips"


@contextlib.contextmanager
def _used(model: nn.Module, form: ClipForm, num_frames: int) -> Iterator[None]:
    handles = _use(model, form, num_frames)
    with removed_after(handles):
        yield


def _use(model: nn.Module, form: ClipForm, num_frames: int) -> list[Any]:
    """Register the hooks of a form, and return their handles."""
    handles: list[Any] = []
    if form == "channels first":
        handles.append(model.register_forward_pre_hook(_channels_first, with_kwargs=True))
    if form == "frame by frame":
        hook = partial(_frames_as_images, num_frames=num_frames)
        handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
    if form == "frames first":
        handles.append(model.register_forward_hook(_rows_of_logits))
    if form in {"frame by frame", "logits of frames"}:
        handles.append(model.register_forward_hook(partial(_mean_of_frames, num_frames=num_frames)))
    return handles


def _channels_first(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: (B, T, C, H, W) to (B, C, T, H, W)."""
    x_BTCHW = _clips_of(args, kwargs)
    return _with_input(args, kwargs, x_BTCHW, x_BTCHW.transpose(1, 2))


def _clips_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor that a forward is called with, by position or by name (`pixel_values=clips`)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError("no clips: the forward is called without a tensor")


def _with_input(args: Any, kwargs: Any, old: Tensor, new: Tensor) -> tuple[Any, Any]:
    """Return the arguments with another tensor in the place of one."""
    positional = tuple(new if value is old else value for value in args)
    return positional, {name: new if value is old else value for name, value in kwargs.items()}


def _frames_as_images(model: nn.Module, args: Any, kwargs: Any, *, num_frames: int) -> tuple[Any, Any]:
    """Forward pre-hook: (B, T, C, H, W) to (B·T, C, H, W)."""
    x_BTCHW = _clips_of(args, kwargs)
    if x_BTCHW.ndim != 5 or x_BTCHW.shape[1] != num_frames:
        raise ValueError(
            f"{type(model).__name__} was set to take clips (batch, {num_frames}, channels, height, width), but got "
            f"{tuple(x_BTCHW.shape)}"
        )
    return _with_input(args, kwargs, x_BTCHW, x_BTCHW.flatten(0, 1))


def _rows_of_logits(model: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: logits (B, 1, K), of one query of an attention pooling (VideoPrism), to (B, K)."""
    logits = logits_of(output)
    return logits.squeeze(1) if logits.ndim == 3 and logits.shape[1] == 1 else output


def _mean_of_frames(model: nn.Module, args: Any, output: Any, *, num_frames: int) -> Tensor:
    """Forward hook: logits (B·T, K) of frames to those of clips (B, K)."""
    logits = logits_of(output)
    return logits.reshape(-1, num_frames, *logits.shape[1:]).mean(1)
