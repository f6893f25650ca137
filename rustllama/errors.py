"""Every way rustllama can fail: one tree, each class with its HTTP status and machine-readable code.

RustllamaError
├── BadRequest               400  invalid_request
│   ├── Unsupported          400  unsupported              a field or ability that is not there
│   ├── ContextExceeded      400  context_length_exceeded
│   ├── TemplateRefused      400  template_error
│   │   └── TemplateTooCostly     template_error           it was ended, and would only be ended again
│   ├── BadModelFile         400  bad_model_file           the file named by a create or a record cannot be served
│   └── SourceRefused        400  source_refused           where a model is to be pulled from does not give it
├── Unauthorized             401  unauthorized             no API key, or none that is known
├── Forbidden                403  forbidden                not from this page, to this host, or with this key
├── NotFound                 404  not_found
│   └── ModelNotFound        404  model_not_found
├── MethodNotAllowed         405  method_not_allowed
├── TooSlow                  408  request_timeout          the client, not the server
├── TooLarge                 413  too_large
├── TooManyRequests          429  rate_limited             more than an API key or an address may have
├── Cancelled                499  cancelled                never sent, only logged
├── InternalError            500  internal_error
├── ReadOnly                 500  read_only                the state folder may not be written
├── Unavailable              503  unavailable              worth another try
│   ├── Busy                 503  busy
│   ├── Unreachable          503  unreachable_source       another server, which a model is to be pulled from
│   ├── Draining             503  draining
│   ├── OutOfMemory          503  out_of_memory
│   └── Quarantined          503  quarantined              the model killed workers: not loaded for a while
├── DiskFull                 507  disk_full
├── SettingError             –    bad_setting              stops the start: exit status 2
├── ServerUnreachable        –    unreachable              the console found no server: exit status 1
└── AnswerLost               –    answer_lost              the console's connection broke in an answer
"""

import errno


class RustllamaError(Exception):
    """Root of the tree; its text is one sentence that says what to do next and may be shown to a client."""

    status = 500
    code = "internal_error"
    retry_after_s: int | None = None


class BadRequest(RustllamaError):
    status = 400
    code = "invalid_request"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Unsupported(BadRequest):
    code = "unsupported"


class ContextExceeded(BadRequest):
    code = "context_length_exceeded"


class TemplateRefused(BadRequest):
    code = "template_error"


class TemplateTooCostly(TemplateRefused):
    pass


class BadModelFile(BadRequest):
    code = "bad_model_file"


class SourceRefused(BadRequest):
    code = "source_refused"


class Unauthorized(RustllamaError):
    status = 401
    code = "unauthorized"


class Forbidden(RustllamaError):
    status = 403
    code = "forbidden"


class NotFound(RustllamaError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RustllamaError):
    status = 405
    code = "method_not_allowed"


class TooSlow(RustllamaError):
    status = 408
    code = "request_timeout"


class TooLarge(RustllamaError):
    status = 413
    code = "too_large"


class TooManyRequests(RustllamaError):
    status = 429
    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(RustllamaError, BrokenPipeError):
    """The client has gone. A BrokenPipeError too, as that is what servers of HTTP pass over in silence."""

    status = 499
    code = "cancelled"

    def __init__(self) -> None:
        super().__init__(errno.EPIPE, "the client has gone")


class InternalError(RustllamaError):
    """Our own fault: the log carries the details under the request's id."""


class ReadOnly(RustllamaError):
    code = "read_only"


class Unavailable(RustllamaError):
    status = 503
    code = "unavailable"
    retry_after_s: int | None = 2


class Busy(Unavailable):
    code = "busy"


class Unreachable(Unavailable):
    code = "unreachable_source"

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Unavailable):
    code = "draining"


class OutOfMemory(Unavailable):
    code = "out_of_memory"
    retry_after_s = 30


class Quarantined(Unavailable):
    code = "quarantined"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DiskFull(RustllamaError):
    status = 507
    code = "disk_full"


class SettingError(RustllamaError):
    code = "bad_setting"


class ServerUnreachable(RustllamaError):
    code = "unreachable"


class AnswerLost(RustllamaError):
    code = "answer_lost"
