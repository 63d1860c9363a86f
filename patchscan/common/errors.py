"""The exit codes, and the base of every error that a user can mend: the command line prints it as one line.

Each package defines the errors of its own, beside the code that raises them:

    Exception
    |-- UserError                      ends the command with its exit_code, 2 unless stated
    |   |-- OutageError                (75) nothing has worked for minutes; what is done is kept
    |   |-- StoreError                 the bucket, folder or credentials cannot be used
    |   |   `-- ManifestError          a list of objects that cannot be read
    |   |-- DataError, LayoutError, IndexFileError, ProtocolError     data sets
    |   |-- CardError, WeightsError                                   run folders
    |   |-- NotFiniteError             a model's output is NaN or infinite: a failed row
    |   |-- RecipeError, DeviceError, EnsembleError                   training
    |   |-- EvaluationError, ExplainError, VideoError                 evaluation
    |   |-- ArchiveError, VerifyError, ServerError                    serving
    |   |-- RegistryError              versions of a served model
    |   |   `-- ServerDownError        (75) the server does not answer
    |   |-- LabelError, WebhookError, ScorerError                     scans
    |   |-- PlanError                  a scan's plan or its parts
    |   |   |-- ClaimLostError         (75) another scan began at the same time
    |   |   `-- IncompleteScanError    shards are missing
    |   |-- ClusterError, ConfigurationError                          clusters
    |   |-- ShardsFailedError          (75) a Job ended and shards are missing
    |   `-- RejectedArchiveError       (1) a new archive did not become ready and was taken back
    |-- TransientError                 a call that may work in a moment: retried, then an OutageError or a failed row
    |-- StoppedError                   SIGTERM or Ctrl-C: what is done is kept
    |-- ObjectError                    one object cannot be read: a failed row
    |-- RefusedRequestError            the server will not take this image: a failed row
    |-- AlreadyExistsError, JobGoneError    what a cluster holds is not what was thought
    `-- ValueError
        |-- ImageError                 one image cannot be scored, for good: a rejected row
        `-- RequestError               one request to the handler that makes no sense: HTTP 400
"""

# Work that was told to stop ends with it: what is done is kept, and the same command goes on.
EXIT_INTERRUPTED = 75


class UserError(Exception):
    """Something the user must change: a path, an option, a file. The message says what is wrong and what to do;
    `exit_code` is what the command ends with."""

    exit_code = 2
