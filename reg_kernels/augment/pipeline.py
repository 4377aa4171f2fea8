"""A pipeline of transforms: what it draws for each sample, and the one pass that does it all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import _part, backends
from .._augment_program import Filter, Op
from .._compiler import not_compiled
from .._dtypes import DTYPES, named
from .._numbers import integer, number
from ..ops import augment as op
from ..ops._modes import FUNC, is_fake, unseen, watcher
from . import _draws
from ._assemble import Assembly
from ._images import LAYOUTS, Batch, _refuse, checked_indices, packed
from ._mix import MIX_COLUMNS, check_unmixed, columns_of, mixed_masks, on_device
from ._plan import KEYS, Plan, plan_of
from ._replay import Masks, moved_boxes, moved_points
from ._transform import Transform
from .mixup import Mixup
from .noise import ToDtype
from .params import Params
from .torchvision import transforms_of

_FORMATS = (torch.contiguous_format, torch.channels_last)


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _on_host(method: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """What is drawn and written lies on the CPU, whatever torch.set_default_device says; and
    torch.compile calls it as it is, since what is written depends on the values that are drawn."""

    @not_compiled
    @functools.wraps(method)
    def called(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        if torch.get_default_device().type == "cpu":
            return method(*args, **options)
        with torch.device("cpu"):
            return method(*args, **options)

    return called


class Pipeline:
    """Does all its transforms to a batch in one pass: from bytes to the normalised batch that a
    network takes, each sample with draws of its own.

    Args:
        transforms: what is done, in this order; those of this module, which bear the names and take
            the arguments of `torchvision.transforms.v2`. A `Mixup` may be the last one. After a
            `Normalize` there may be erasing and noise without `clip` alone.
        seed: of all draws. None draws one from torch's generator.
        dtype: of the result: float32, float16, bfloat16, uint8, or float64 by the reference. None
            takes that of a `ToDtype`; else torch's default for bytes with a `Normalize` or a
            `Mixup`; else the input's.
        memory_format: of the result: torch.contiguous_format or torch.channels_last. None keeps
            the input's.
        layout: "NCHW" or "NHWC", what an input's axes are. None: the channels are the axis, second
            or last, of 1 to 4; where both may be, it has to be given.
        exact: "torchvision" gives torchvision's results for bytes, which has whole numbers after
            each transform: the same bits where pixels are copied or looked up, and one level away
            at most where a bilinear filter or a blur sums; bicubic may be further. None keeps
            floats between transforms and rounds once.
        fuse_geometry: True makes one interpolation of rotations, affine and perspective transforms
            in a row, of flips beside them and of crops after them. That is sharper and faster, and
            what the first pushes out of the image the second may bring back. Crops, flips and a
            resize in a row always are one, and the same.
        same_on_batch: True draws once for a batch, by its first sample, as for the frames of a
            video.
        crop_share: what share of the shorter side a `RandomResizedCrop` leaves in evaluation.
        backend: "native", "triton" or "reference"; None takes the first that can run at a call.

    A call takes images, uint8 in [0, 255] or floats in [0, 1]: (N, C, H, W), (N, H, W, C), or a
    list of (C, H, W) or (H, W, C) of different sizes, of 1 to 4 channels, on any device. It returns
    (N, C, height, width). A result of floats is in [0, 1] until a `Normalize`. With a target it
    returns both, the target as it is or, with a `Mixup`, mixed; with `return_params=True` the
    `Params` last. The gradient goes to images of floats.

    Every draw depends on (seed, epoch, sample index, transform) alone: an image gets the same
    augmentation whatever its batch, worker, rank or device, and a transform that is left out shifts
    no other's. Sample indices are `indices=` of a call, (N,), or else counted on from the epoch's
    begin. In a DataLoader's workers they have to be given; with several ranks too, unless
    `distributed.shard` or `distributed.batch` says where the rank's samples are in the batch of all
    ranks, by which they are counted then. What is drawn once for a batch is drawn by the first
    index of that, and by each rank's own first one where indices are given. `set_epoch` begins an
    epoch, and `state_dict` says where in it a run is. All is drawn on the CPU, and nothing waits
    for a GPU.

    In evaluation, after `eval()`, a `RandomResizedCrop` is a resize and a centre crop, a
    `RandomCrop` a centre crop; `Resize`, `CenterCrop`, `Pad`, `Grayscale`, `Normalize` and
    `ToDtype` stay, and the others are left out.

    Raises:
        ValueError: at construction: transforms that cannot follow one another. At a call: images of
            another rank, no images, channels that a transform has no meaning for, images that are
            too small for a transform, results of different sizes, parameters of another pipeline.
        TypeError, RuntimeError: another type or dtype.

    Example::

        pipeline = augment.Pipeline(
            augment.RandomResizedCrop(224), augment.RandomHorizontalFlip(),
            augment.RandAugment(2, 9), augment.Normalize(MEAN, STD), augment.RandomErasing(0.25),
            augment.Mixup(0.2, cutmix_alpha=1.0), dtype=torch.float16)
        for epoch in range(epochs):
            pipeline.set_epoch(epoch)
            for images, target in loader:
                images, target = pipeline(images, target)

    Workers of a DataLoader so decode and collate bytes alone: images of one size by the default
    `collate_fn`, others by one that returns their list.
    """

    def __init__(
        self,
        *transforms: Transform | Mixup,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        layout: str | None = None,
        exact: str | None = None,
        fuse_geometry: bool = True,
        same_on_batch: bool = False,
        crop_share: float = 0.875,
        backend: str | None = None,
    ) -> None:
        self.transforms = transforms
        self._mixup: Mixup | None = None
        if transforms and isinstance(transforms[-1], Mixup):
            self._mixup, transforms = transforms[-1], transforms[:-1]
        drawn = _checked_order(transforms)
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        self.seed = integer("Pipeline", "seed", seed)
        normalizes = any(transform.normalizes for transform in drawn)
        self._needs_floats = normalizes or self._mixup is not None
        self.dtype = _checked_dtype(dtype, drawn, self._needs_floats)
        if memory_format not in (None, *_FORMATS):
            _refuse("memory_format", "None, torch.contiguous_format or torch.channels_last",
                    memory_format)  # fmt: skip
        if layout not in (None, *LAYOUTS):
            _refuse("layout", f"None or one of {', '.join(LAYOUTS)}", repr(layout))
        if exact not in (None, "torchvision"):
            _refuse("exact", 'None or "torchvision"', repr(exact))
        if backend is not None:
            backends.check_name(backend, "backend")
        crop_share = number("Pipeline", "crop_share", crop_share)
        if not 0 < crop_share <= 1:
            _refuse("crop_share", "in (0, 1]", crop_share)
        self.memory_format, self.layout, self.exact = memory_format, layout, exact
        self.fuse_geometry = bool(fuse_geometry)
        self.same_on_batch = bool(same_on_batch)
        self.crop_share, self.backend = crop_share, backend
        stand_ins = (x for transform in drawn for x in transform.for_evaluation(crop_share))
        mixing = MIX_COLUMNS if self._mixup is not None else ()
        self._plans = {True: plan_of(drawn, mixing), False: plan_of([*stand_ins])}
        self.training = True
        self._epoch = 0
        self._position = 0
        self._sharding: _part.Sharding | None = None  # `distributed.shard` sets it

    @classmethod
    def from_torchvision(cls, compose: Any, **options: Any) -> Pipeline:
        """The pipeline that does what a `torchvision.transforms.v2.Compose` does.

        torchvision is not imported: transforms are known by their classes' names and attributes. A
        MixUp or CutMix at the end is a `Mixup`, whose partners are the samples of the batch from
        its end.

        Args:
            compose: the `Compose`, or one transform.
            options: as of `Pipeline`.

        Raises:
            ValueError: some transforms have no counterpart; it names them all.
        """
        return cls(*transforms_of(compose), **options)

    def __repr__(self) -> str:
        names = (
            *("seed", "dtype", "memory_format", "layout", "exact", "fuse_geometry"),
            *("same_on_batch", "crop_share", "backend"),
        )
        shown = [
            *map(repr, self.transforms),
            *(f"{name}={getattr(self, name)!r}" for name in names),
        ]
        return f"Pipeline({', '.join(shown)})"

    # Where a run is

    def train(self, mode: bool = True) -> Pipeline:
        """Has later calls draw, or with a `mode` of False do what evaluation needs; returns the
        pipeline."""
        self.training = bool(mode)
        return self

    def eval(self) -> Pipeline:
        """Has later calls draw nothing and do what evaluation needs; returns the pipeline."""
        return self.train(False)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch: its draws are its own, and samples are counted from 0."""
        epoch = integer("Pipeline", "epoch", epoch)
        if not 0 <= epoch < 2**32:
            _refuse("epoch", "from 0 to 2**32 - 1", epoch)
        self._epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, and how many samples of the epoch were counted."""
        return {"seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from where `state` was taken, by `state_dict`, with the same draws.

        Raises:
            ValueError: it is not what `state_dict` returned.
        """
        if not isinstance(state, dict) or set(state) != {"seed", "epoch", "position"}:
            _refuse("state", "what state_dict returned", state)
        self.seed = integer("Pipeline", "seed", state["seed"])
        self.set_epoch(state["epoch"])
        position = integer("Pipeline", "position", state["position"])
        if position < 0:
            _refuse("position", "at least 0", position)
        self._position = position

    # Calls

    @_on_host
    def __call__(
        self,
        images: Tensor | Sequence[Tensor],
        target: Any = None,
        *,
        indices: Tensor | Sequence[int] | None = None,
        return_params: bool = False,
    ) -> Any:
        if watcher() not in (None, FUNC) or is_fake():
            raise RuntimeError(
                "Pipeline: a pipeline cannot be traced or exported, as the program would hold what "
                "one call has drawn: call it outside, on the batch that the program gets"
            )
        placed = self._placed(images) if indices is None else None
        is_none = isinstance(images, Tensor) and self._has_no_part(images)
        if is_none:  # one image shows what the result is like
            assert isinstance(images, Tensor)
            images = images.new_zeros(1, *images.shape[1:])
        batch = packed(images, self.layout)
        samples = 0 if is_none else len(batch.images)
        mixes = self._mixup is not None and self.training
        if mixes and target is None:
            _refuse("target", "given where Mixup mixes it", None)
        # By the first of `of_batch` one draw is for all.
        if placed is None:
            keys = checked_indices(indices, samples)
            of_batch = keys[:1] if samples else unseen(torch.zeros)(1, dtype=torch.int64)
        else:
            of_batch, keys = self._counted(*placed)
        is_alike = self.same_on_batch or is_none
        own = of_batch.expand(len(batch.images)) if is_alike else keys
        drawn, assembly = self._assembled(batch, own)
        result: Any = self._run(batch, assembly)
        if is_none:
            result, drawn = result[:0], [x[:0] for x in drawn]
        mixed: Any = target
        if mixes:
            assert self._mixup is not None and target is not None
            of_mixing = of_batch if self._mixup.mode == "batch" else keys
            draws = _draws.MixDraws(self.seed, self._epoch, of_mixing)
            mixing = unseen(self._mixup.draw)(result.shape, draws)
            drawn += columns_of(mixing, samples)
            result, mixed = self._mixup.mix(result, target, lambda: on_device(mixing, result))
        extra = [] if target is None else [mixed]
        if return_params:
            plan = self._plans[self.training]
            extra.append(Params(unseen(torch.stack)(drawn, 1), plan.columns, self._described(plan)))
        return (result, *extra) if extra else result

    def _placed(self, images: Any) -> tuple[int, int, int]:
        """The batch's samples, those of the ranks before this one, and those of all."""
        samples = len(images) if isinstance(images, Tensor | Sequence) else 0  # refused later
        part = None
        if self.training:
            part = _part.of_batch(self._sharding, "Pipeline", samples)
        return (samples, 0, samples) if part is None else (samples, *part[:2])

    def _has_no_part(self, images: Tensor) -> bool:
        """Whether this rank has no images of a batch of which others may have some."""
        if images.dim() != 4 or len(images):
            return False
        return self._sharding is not None or (_part.used and _part.current() is not None)

    @unseen
    def _counted(self, samples: int, first: int, total: int) -> tuple[Tensor, Tensor]:
        """The indices of the first sample of all ranks, (1,), and of this one's, int64 (N,)."""
        begin = self._position
        if self.training:
            self._position += total
        return torch.tensor([begin]), torch.arange(begin + first, begin + first + samples)

    @property
    def _fuses(self) -> bool:
        return self.fuse_geometry and self.exact is None

    def _described(self, plan: Plan) -> str:
        """What parameters go by: a plan, and how its geometry is done."""
        return plan.described + ("" if self._fuses else " with fuse_geometry=False")

    def _assembly(self, sizes: Tensor, channels: int, is_bytes: bool, **options: Any) -> Assembly:
        height, width = sizes.T.double().contiguous()
        options = {"is_exact": self.exact is not None, "fuse": self._fuses} | options
        return Assembly(height, width, channels, bound=255.0 if is_bytes else 1.0, **options)

    @unseen
    @torch.inference_mode()  # takes a fifth off what the operations cost
    def _assembled(self, batch: Batch, keys: Tensor) -> tuple[list[Tensor], Assembly]:
        """Draws the columns of the parameters, and writes the program as it goes, since a transform
        draws by the sizes that those before it leave."""
        plan = self._plans[self.training]
        is_bytes = batch.pixels.dtype == torch.uint8
        if self.exact is not None and not is_bytes:
            _refuse("images", "uint8 with exact", named(batch.pixels.dtype))
        sizes = batch.images[:, 1:]
        assembly = self._assembly(sizes, batch.channels, is_bytes, sides=batch.sides)
        epoch = torch.full_like(assembly.height, self._epoch)
        rows = [keys.double(), epoch, assembly.height, assembly.width]
        words = _draws.uniform(self.seed, self._epoch, keys, plan.groups)
        for step in plan.steps:
            transform = step.transform
            assembly.name = step.name
            on = None
            if step.has_flag:
                on = words[step.word] < transform.p
                rows.append(on.double())
            first = step.word + 1
            own = transform.draw(words[first : first + transform.needed_words], assembly)
            drawn = [assembly.of_samples(x) for x in own]
            rows += drawn
            transform.write(dict(zip(transform.columns, drawn, strict=True)), on, assembly)
        return rows, assembly

    def _run(self, batch: Batch, assembly: Assembly) -> Tensor:
        dtype = self.dtype
        if dtype is None:
            dtype = batch.pixels.dtype
            if dtype == torch.uint8 and self._needs_floats:
                dtype = torch.get_default_dtype()
        with torch.inference_mode():
            # Floats are in [0, 1], and bytes in [0, 255].
            if not assembly.is_normalized:
                scale = (255.0 if dtype == torch.uint8 else 1.0) / assembly.bound
                if scale != 1:
                    assembly.colour(Op.NORMALIZE, None, *[scale] * 4)
            program = assembly.program()
        program = unseen(program.clone)()  # a gradient's formula takes no other
        height, width = self._final(assembly)
        is_last = self.memory_format == torch.channels_last
        if self.memory_format is None:
            is_last = batch.keeps_channels_last
        result = op.run(
            *(batch.pixels, batch.images, program, batch.channels, batch.is_channels_last),
            *(height, width, dtype, is_last, self.exact is not None),
            backend=self.backend,
        )
        if assembly.channels < batch.channels:  # gray
            format = torch.channels_last if is_last else torch.contiguous_format
            result = result[:, : assembly.channels].contiguous(memory_format=format)
        return result

    def _final(self, assembly: Assembly) -> tuple[int, int]:
        if assembly.sides is not None:
            return assembly.sides
        height, width = int(assembly.height[0]), int(assembly.width[0])
        wrong = (assembly.height != height) | (assembly.width != width)
        if wrong.any():
            sample = int(wrong.nonzero()[0])
            other = (int(assembly.height[sample]), int(assembly.width[sample]))
            must = "such that all images end at one size, as after a crop or a Resize to two sides"
            _refuse("transforms", must, f"{(height, width)} and {other}")
        return height, width

    # The same once more, for what lies on the images

    @unseen
    def _replayed(self, params: Params, **options: Any) -> Assembly:
        """The geometry of what was drawn. The op does not round masks, nor takes their matrices, as
        torchvision does those of bytes."""
        if not isinstance(params, Params):
            _refuse("params", "what a call returned", type(params).__name__, TypeError)
        plan = next(
            (plan for plan in self._plans.values()
             if (self._described(plan), plan.columns) == (params.pipeline, params.columns)),
            None,
        )  # fmt: skip
        if plan is None:
            must = f"of this pipeline, {self._described(self._plans[self.training])}"
            _refuse("params", must, f"those of {params.pipeline}")
        rows = params.table.T.contiguous().unbind(0)
        sizes = torch.stack(rows[2:4], 1)
        assembly = self._assembly(sizes, 3, True, is_exact=False, **options)
        place = len(KEYS)
        for step in plan.steps:
            assembly.name = step.name
            on = rows[place] > 0 if step.has_flag else None
            place += step.has_flag
            drawn = dict(zip(step.transform.columns, rows[place:], strict=False))
            step.transform.write(drawn, on, assembly)
            place += len(step.transform.columns)
        return assembly

    @_on_host
    def apply(
        self,
        masks: Tensor | Sequence[Tensor],
        params: Params,
        *,
        fill: float = 0,
        interpolation: str = "nearest-exact",
    ) -> Tensor:
        """What was done to the images, done to masks: geometry alone, and by the nearest pixel.

        Args:
            masks: (N, H, W) or (N, C, H, W), or a list of (H, W) or (C, H, W) of the images' sizes;
                of 1 to 4 channels, and of any dtype but complex. All values stay as they are, those
                of int64, too.
            params: of the images' call. Where that mixed, the same partners' boxes are pasted, and
                masks of floats are blended as the images were.
            fill: what is seen outside of a mask, as 255 for labels that a loss leaves out; a value
                of the masks' dtype.
            interpolation: how a resize looks up its pixel: "nearest-exact", by centres, or
                "nearest", by corners, as torchvision does.

        Returns:
            (N, height, width) or (N, C, height, width), of the masks' dtype.

        Raises:
            ValueError: the images were blended, and the masks are of whole numbers: labels have no
                mean. Others as of a call.
        """
        filters = {"nearest": Filter.NEAREST, "nearest-exact": Filter.NEAREST_EXACT}
        if interpolation not in filters:
            _refuse("interpolation", f"one of {', '.join(filters)}", repr(interpolation))
        fill = number("Pipeline", "fill", fill)
        given = Masks(masks, fill)
        batch = given.batch
        assembly = self._replayed(params, mask=given.fill, mask_filter=filters[interpolation])
        if len(batch.images) != len(params):
            _refuse("masks", f"of as many samples as params, {len(params)}", len(batch.images))
        sizes = torch.stack((params["height"], params["width"]), 1)
        wrong = (sizes != batch.images[:, 1:]).any(1)
        if wrong.any():
            sample = int(wrong.nonzero()[0])
            size = tuple(int(side) for side in sizes[sample])
            got = f"{tuple(batch.images[sample, 1:].tolist())} at {sample}"
            _refuse("masks", f"of the images' sizes, {size}", got)
        program = assembly.program()
        height, width = self._final(assembly)
        result = op.run(
            *(batch.pixels, batch.images, program, batch.channels, batch.is_channels_last),
            *(height, width, batch.pixels.dtype, False, False),
            backend=self.backend,
        )
        return mixed_masks(given.of(result), params)

    @_on_host
    def boxes(self, boxes: Tensor | Sequence[Tensor], params: Params) -> Any:
        """Where boxes of the images are in the result.

        A box is where its four corners go, as the smallest upright rectangle around them: of a
        rotated one, larger than the object. It is clipped to the result; one that lies outside has
        no area.

        Args:
            boxes: (N, K, 4), or a list of (K, 4), a different K each: x1, y1, x2, y2 in pixels,
                from the image's upper left corner.
            params: of the images' call.

        Returns:
            The same of the result, float32, on the boxes' device.

        Raises:
            ValueError: the images were mixed. Others as of a call.
        """
        assembly = self._replayed(params, tracks=True, mask=0.0)
        check_unmixed("boxes", params)
        return moved_boxes(boxes, assembly)

    @_on_host
    def keypoints(self, keypoints: Tensor | Sequence[Tensor], params: Params) -> Any:
        """Where points of the images are in the result; they may lie outside of it.

        Args:
            keypoints: (N, K, 2), or a list of (K, 2): x, y in pixels from the image's upper left
                corner. The centre of the first pixel is (0.5, 0.5).
            params: of the images' call.

        Returns:
            The same of the result, float32, on the points' device.

        Raises:
            ValueError: the images were mixed. Others as of a call.
        """
        assembly = self._replayed(params, tracks=True, mask=0.0)
        check_unmixed("keypoints", params)
        return moved_points(keypoints, assembly)


def _checked_order(transforms: Sequence[Any]) -> list[Transform]:
    normalized: Transform | None = None
    for transform in transforms:
        if isinstance(transform, Mixup):
            _refuse("transforms", "such that Mixup is the last one", transform)
        if not isinstance(transform, Transform):
            _refuse("transforms", "of this module", type(transform).__name__, TypeError)
        if normalized is not None and not transform.after_normalize:
            must = "erasing or noise without clip after Normalize"
            _refuse("transforms", must, transform)
        if transform.normalizes:
            normalized = transform
    return [*transforms]


def _checked_dtype(
    dtype: torch.dtype | None, transforms: Sequence[Transform], needs_floats: bool
) -> torch.dtype | None:
    if dtype is None:
        named_ones = [x.dtype for x in transforms if isinstance(x, ToDtype)]
        return named_ones[-1] if named_ones else None
    if dtype not in DTYPES and dtype != torch.uint8:
        _refuse("dtype", "None, uint8 or one of " + ", ".join(map(named, DTYPES)), dtype)
    if dtype == torch.uint8 and needs_floats:
        _refuse("dtype", "of floats with Normalize or Mixup", named(dtype))
    return dtype
