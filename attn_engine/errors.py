"""The one catalogue of mistakes: a class each, with a message, the user's line and the next step.

    MaskIsNotBool: my_masks.py:14 in visible
       14 |     return q_idx - kv_idx
          |            ^^^^^^^^^^^^^^
      A mask returns a bool; this is an int. Compare it, for example `q_idx - kv_idx <= window`.

A class states `template` and `advice`; both are filled from the keywords given where it is raised, which must be
exactly those that the two name. Every keyword is also an attribute.
"""

from __future__ import annotations

from attn_engine.error_base import AttnEngineError as AttnEngineError
from attn_engine.locations import Location as Location
from attn_engine.locations import definition_of as definition_of
from attn_engine.locations import is_user_code as is_user_code
from attn_engine.locations import location_of as location_of

# ---- q, k, v and their descriptions


class NotATensor(AttnEngineError, TypeError):
    template = "{argument} is a {got}, not a torch.Tensor."
    advice = "Call the engine with tensors: engine(q, k, v)."


class WrongRank(AttnEngineError, ValueError):
    template = "{argument} has {got} dimensions, shape {shape}; it must have {expected}."
    advice = "Give it as {layout}; a single sequence needs batch and head dimensions of 1."


class DtypeMismatch(AttnEngineError, TypeError):
    template = "{argument} is {got}, but q is {expected}; q, k and v share one dtype."
    advice = "Convert it: {argument}.to({expected}); under torch.autocast some layers change the dtype of one of them."


class UnsupportedDtype(AttnEngineError, TypeError):
    template = "{argument} is {got}, which is not among {supported}."
    advice = "Convert it with .to(...) first."


class DeviceMismatch(AttnEngineError, ValueError):
    template = "{argument} is on {got}, but q is on {expected}."
    advice = 'Move it: {argument}.to("{expected}").'


class HeadDimMismatch(AttnEngineError, ValueError):
    template = "{argument} has head dimension {got}; it must be {expected}, as {reason}."
    advice = "The head dimension is compiled in: make another engine for another one."


class HeadsNotDivisible(AttnEngineError, ValueError):
    template = "q has {heads} heads and k has {kv_heads}: {heads} is not a multiple of {kv_heads}."
    advice = "Grouped-query attention gives every key head the same number of query heads."


class ShapeMismatch(AttnEngineError, ValueError):
    template = "{argument} has shape {got}; expected {expected}, because {reason}."
    advice = "Check how it was made or transposed."


class WrongLayout(AttnEngineError, ValueError):
    template = '{argument} has shape {shape}, which does not fit layout "{layout}" but fits "{other}".'
    advice = 'Make the engine with layout="{other}", or transpose dimensions 1 and 2 of the tensors.'


class UnknownLayout(AttnEngineError, ValueError):
    template = "layout={layout!r} is not known."
    advice = 'Use "bshd" (batch, length, heads, dim) or "bhsd" (batch, heads, length, dim).'


class WrongMeta(AttnEngineError, ValueError):
    template = "meta_tensor: {argument}={got!r} is not {expected}."
    advice = "meta_tensor(B, H, S, D, dtype=...) takes batch, heads, length, head dimension in this order."


class MetaMismatch(AttnEngineError, ValueError):
    template = "{argument} has {dimension} {got}, but its meta_tensor says {expected}."
    advice = "Pass None instead of {expected} in the meta_tensor to allow any."


class MetaDtypeMismatch(MetaMismatch):
    advice = "Convert it with .to({expected}), or make another engine whose meta_tensors say dtype={got}."


# ---- custom inputs


class WrongCustomIO(AttnEngineError, ValueError):
    template = "CustomIO: input {name!r} has shape {shape!r}: {reason}."
    advice = 'A dimension is one of "batch", "heads", "seq_len", "seq_len_kv" or a positive int.'


class NotACustomIO(AttnEngineError, TypeError):
    template = "{argument} is {got}, not {expected}."
    advice = 'Write CustomIO({{"bias": ("heads", "seq_len")}}): a name and a shape for each input.'


class UnknownCustomInput(AttnEngineError, KeyError):
    template = "There is no custom input {name!r}; the engine's CustomIO has {known}."
    advice = 'Declare it: CustomIO({{"{name}": shape}}).'


class MissingCustomInput(AttnEngineError, TypeError):
    template = "Custom input {name!r} is missing; the engine's CustomIO lists {expected}."
    advice = "Pass it after v, in this order, or by name: engine(q, k, v, {name}=tensor)."


class ExtraCustomInput(AttnEngineError, TypeError):
    template = "Custom input {name} is one too many; the engine's CustomIO lists {expected}."
    advice = "Remove it, or declare it in CustomIO."


class CustomInputShape(AttnEngineError, ValueError):
    template = (
        "Custom input {name!r} has shape {got}; its CustomIO shape {declared} is {expected} in this call."
    )
    advice = "Reshape or expand it."


# ---- tracing


class WrongParameters(AttnEngineError, TypeError):
    template = "{what} takes {expected}; this one takes {got}."
    advice = "Bind further arguments with functools.partial or a closure."


class ControlFlowOnTraced(AttnEngineError, TypeError):
    template = "This asks for the truth value of a traced {kind}: it differs per score, so Python cannot branch on it."
    advice = (
        "Use torch.where(condition, a, b) for `if`; `&`, `|`, `~` for `and`, `or`, `not` and chained comparisons; "
        "torch.minimum / torch.maximum for min() / max()."
    )


class NumberFromTraced(AttnEngineError, TypeError):
    template = "{call} needs one number, but this traced {kind} differs for every score."
    advice = "{instead}"


class MaskIsNotBool(AttnEngineError, TypeError):
    template = "A mask returns a bool (True keeps the score); this is {got}."
    advice = "Compare it, for example `q_idx - kv_idx <= window`."


class ScoreIsBool(AttnEngineError, TypeError):
    template = "A score_mod returns a number; this is a bool."
    advice = 'Give it as mask_mod, or use torch.where(condition, score, -float("inf")).'


class ScoreNotTraced(AttnEngineError, TypeError):
    template = "A score_mod returns a value computed from its arguments; this is {got}."
    advice = "Return the new score, for example `return score * 2`."


class ReturnsTensor(AttnEngineError, ValueError):
    template = "{what} returns one value per (b, h, q_idx, kv_idx); this is a tensor of shape {shape}."
    advice = "Index it with the arguments, for example `bias[h, q_idx, kv_idx]`."


class UnknownOperation(AttnEngineError, NotImplementedError):
    template = "{operation} cannot be traced."
    advice = "{instead}"


class UnknownMethod(UnknownOperation, AttributeError):
    pass


class WrongOperands(AttnEngineError, TypeError):
    template = "{operation} takes {expected}, not {got}."
    advice = "{instead}"


class WrongIndexCount(AttnEngineError, IndexError):
    template = "{tensor} has {rank} dimensions (shape {shape}) and is used with {got} indices."
    advice = "Give one index per dimension: {tensor}[{example}]."


class VectorTooLong(AttnEngineError, NotImplementedError):
    template = (
        "{tensor} is used as a vector of {got} numbers; inside a function at most {most} are written out."
    )
    advice = (
        "Give one index per dimension, or compute what the function needs of the vectors before the call, for example "
        "as a matrix of dot products."
    )


class IndexedNumpyArray(AttnEngineError, TypeError):
    template = "A numpy array cannot be indexed with a traced value."
    advice = "Make it a tensor outside the function, with torch.from_numpy(array), and index that."


class IndexNotInteger(AttnEngineError, IndexError):
    template = "{tensor} is indexed with {got}; an index is an int."
    advice = "Convert it with .int(), or compute it with // instead of /."


class IndexOutOfRange(AttnEngineError, IndexError):
    template = "Index {position} of {tensor} reaches {index}, but its size there is {size}."
    advice = "Make the tensor larger or keep the index below {size}."


class IndexNegative(IndexOutOfRange):
    template = (
        "Index {position} of {tensor} (size {size}) goes down to {index}: a negative index is refused here, "
        "where torch would count from the end."
    )
    advice = "Add an offset, clamp it at 0, or hide these pairs with mask_mod."


class IntegerOverflow(AttnEngineError, OverflowError):
    template = "`{expression}` reaches {value} in this call, but the integers of a kernel have 32 bits."
    advice = (
        "Compute it in floating point, x.float(), or keep the numbers smaller before they are multiplied."
    )


class CapturedOnOtherDevice(AttnEngineError, ValueError):
    template = "The captured tensor {name!r} is on {got}, but q is on {expected}."
    advice = 'Move it once, outside the function: {name} = {name}.to("{expected}").'


# ---- online functions


class NotAnOnlineFunc(AttnEngineError, TypeError):
    template = "online_func is {got}, not an OnlineFunc."
    advice = "Give an object of a class derived from OnlineFunc, such as library.OnlineSoftmax()."


class UnknownRowValue(AttnEngineError, KeyError):
    template = "There is no row value {name!r}; {rule} declares {known}."
    advice = "Declare it with its initial number in {declared}."


class OnlineMethodMissing(AttnEngineError, NotImplementedError):
    template = "{rule} does not define {method}."
    advice = "An OnlineFunc needs online_fwd and online_fwd_epilogue."


class OnlineWrongResult(AttnEngineError, TypeError):
    template = "{rule}.{method} returns {got}; expected {expected}."
    advice = "See OnlineFunc for what each method returns."


class OnlineStateMismatch(AttnEngineError, ValueError):
    template = "{rule}.{method} gives row values {got}; the declared ones are {expected}."
    advice = "Return one value for every declared name."


class UnknownReduction(AttnEngineError, ValueError):
    template = "get_reduce({kind!r}) is not known."
    advice = 'Use "max", "min", "sum" or "abssum".'


class RuleNotDerivable(AttnEngineError, NotImplementedError):
    template = "The backward pass of {rule} cannot be derived: {reason}."
    advice = "Define {method} in {rule}."


class RowFunctionResult(AttnEngineError, TypeError):
    template = "The row function {rule} returns {got}; expected {expected}."
    advice = 'Return a row of weights, or (weights, {{"name": row value}}): `return p / p.sum()`.'


class UnorderedReduction(AttnEngineError, ValueError):
    template = "The row function {rule} takes the {kind} of something that another reduction is part of."
    advice = (
        "A {kind} may depend on the raw scores only; a sum may depend on anything before it. "
        "Take the {kind} first and the other reduction from it: (s - s.mean()).max() is s.max() - s.mean()."
    )


class RowFunctionNotDerivable(AttnEngineError, NotImplementedError):
    template = "No kernels can be derived from the row function {rule}: {reason}."
    advice = "Keep it defined for every finite score, or write it as an OnlineFunc with its own methods."


# ---- torch around the engine


class StaleGraph(AttnEngineError, RuntimeError):
    template = "What this attention captures has changed since torch.compile traced it: {what}."
    advice = "Call torch.compiler.reset() and compile again, or pass what changes as a tensor in custom_fwd_inputs."


class TransformNotSupported(AttnEngineError, NotImplementedError):
    template = "The compiled attention does not support {transform}."
    advice = "{instead}"


# ---- backends, options, compilation


class WrongArgument(AttnEngineError, TypeError):
    template = "{argument}={got!r} is not {expected}."
    advice = "{instead}"


class UnknownBackend(AttnEngineError, ValueError):
    template = "backend={backend!r} is not known."
    advice = "Use one of {known}."


class BackendNotInstalled(AttnEngineError, RuntimeError):
    template = 'Backend "{backend}" needs {needs}, which is missing here.'
    advice = "{instead}"


class BackendDeviceMismatch(AttnEngineError, ValueError):
    template = 'Backend "{backend}" does not run tensors on {device}.'
    advice = "{instead}"


class UnsupportedOnBackend(AttnEngineError, NotImplementedError):
    template = 'Backend "{backend}" does not support {feature}.'
    advice = "{instead}"


class GradientNotSupported(AttnEngineError, NotImplementedError):
    template = 'Backend "{backend}" gives no gradient for {what}.'
    advice = "{instead}"


class PooledMaximumNotDifferentiable(AttnEngineError, NotImplementedError):
    template = 'The loss depends on the row output "pooled_max", which has no gradient.'
    advice = "Use rows['pooled_max'].detach(), or with_pooled(..., sum=...): pooled sums have gradients."


class CompilationFailed(AttnEngineError, RuntimeError):
    template = (
        "The compiler rejected a generated kernel.\ncommand: {command}\nsource kept at: {source}\n{output}"
    )
    advice = "\nCompile that file by hand to see more, or choose another backend."


class LaunchFailed(AttnEngineError, RuntimeError):
    template = 'Kernel {kernel} failed on backend "{backend}": {reason}.'
    advice = "Run engine.check(q, k, v) with a smaller input to narrow it down."


class UnsafeCache(AttnEngineError, RuntimeError):
    template = "The kernel cache {path} is not safe to load code from: {reason}."
    advice = "Remove it, or point ATTN_ENGINE_CACHE at a directory that only you can write."


class CacheNotWritten(AttnEngineError, RuntimeError):
    template = "The kernel cache {path} cannot be written: {reason}."
    advice = "Make room there, or point ATTN_ENGINE_CACHE at a directory with room that only you can write."


class BrokenLibrary(AttnEngineError, RuntimeError):
    template = "The compiled kernel {path} cannot be loaded: {reason}."
    advice = "It was compiled afresh and still fails: check $CXX and that the cache lies where code may run."


class UnknownOption(AttnEngineError, TypeError):
    template = "{option}={value!r} is not understood by {where}."
    advice = "Known: {known}."


class MissingParameter(AttnEngineError, TypeError):
    template = "{entry} needs {parameter}=, which was not given."
    advice = "{paper} AttentionLibrary.list() shows every parameter."


class UseNotSupported(AttnEngineError, ValueError):
    template = "use_types={use!r} does not fit {entry}."
    advice = "It is for {known}."


class UnknownSparsity(AttnEngineError, KeyError):
    template = "Unknown sparsity_mode: {mode!r}, should be in ['hash', 'qk']."
    advice = '"hash" takes buckets, "qk" takes what to keep.'


class FractionalKeep(AttnEngineError, ValueError):
    template = "{argument} contains {value}; it keeps (1) or drops (0) a token, nothing between."
    advice = "Threshold it first: (keep > 0.5).float(). To weigh tokens, use a score_mod."


class CompilerMissing(UserWarning):
    """No C++ compiler was found: the slow tile program in torch is used instead."""


class CompilerNotUsable(UserWarning):
    """$CXX names no C++ compiler that works here; another one is tried."""


class DumpNotWritten(UserWarning):
    """ATTN_ENGINE_DUMP names a place that cannot be written; results are not affected."""
