"""Which errors can a user meet? One line each: what was given and expected, what to change."""


class GraphEngineError(Exception):
    """Base of every error a user can cause or fix. The CLI prints it alone and exits with 2."""


class ConfigError(GraphEngineError):
    """An engine option is out of range, or two options contradict each other."""


class ModelError(GraphEngineError):
    """The model directory or its config cannot be used: missing, incomplete or unsupported."""


class WeightsError(ModelError):
    """A weight file is missing, corrupt or in a refused format, or a tensor does not fit."""


class BackendError(GraphEngineError):
    """A device or an attention backend was asked for that this machine does not have."""


class CapacityError(GraphEngineError):
    """The memory granted is too small for what must fit in it."""


class BusyError(GraphEngineError):
    """Another LLM of this process has the GPU, and its kernels need it for themselves."""


class RequestError(GraphEngineError):
    """One request is refused: its prompt or its sampling parameters. Other requests go on."""


class InputError(GraphEngineError):
    """A prompt file cannot be read; names the file and the line."""


class OutputError(GraphEngineError):
    """A job's output cannot be written or gone on with; what is in it stays valid."""


class WorkersLostError(GraphEngineError):
    """Every worker process of a job died; the job can be resumed. The CLI exits with 3."""
