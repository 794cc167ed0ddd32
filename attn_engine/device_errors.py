"""Errors about the device and the packages that a backend needs; `attn_engine.errors` has them too."""

from __future__ import annotations

from attn_engine.error_base import AttnEngineError


class BackendNotInstalled(AttnEngineError, RuntimeError):
    template = 'Backend "{backend}" needs {needs}, which is missing here.'
    advice = "{instead}"


class BackendDeviceMismatch(AttnEngineError, ValueError):
    template = 'Backend "{backend}" does not run tensors on {device}.'
    advice = "{instead}"


class NoGpu(AttnEngineError, RuntimeError):
    template = 'Backend "{backend}" runs on a GPU, and torch finds none here: {reason}.'
    advice = (
        'Use backend="auto", which takes the CPU where the tensors are there, or "triton-interpreter" to try the GPU '
        "kernels on the CPU. With a GPU in the machine, install a build of torch for it."
    )


class OldDriver(AttnEngineError, RuntimeError):
    template = (
        "The GPU's driver supports CUDA {found}, but torch {torch} was built for CUDA {needed}: torch cannot "
        "use the GPU."
    )
    advice = "Install driver {driver} or newer, or a build of torch for CUDA {found} or older."


class UnsupportedGpu(AttnEngineError, RuntimeError):
    template = "{device} is a GPU of architecture {found}; the kernels are made for {known}."
    advice = 'Use backend="cpu" with the tensors on the CPU, or another GPU.'


class StridesTooLarge(AttnEngineError, ValueError):
    template = (
        "{argument} has strides {strides}: rows or columns lie so far apart that a tile of {rows} rows spans "
        "more than 2^31 elements."
    )
    advice = "Lay it out anew: {argument}.contiguous(). Batches and heads may lie any distance apart."
