"""The error tree and the exit codes. The command line prints every UserError as one line. Any
other exception that reaches it is a bug: its traceback is printed, and the exit code is EXIT_BUG.

Each package defines its own errors beside the code that raises them:

    Exception
    |-- UserError                      ends the command with its exit_code, 2 unless stated
    |   |-- OutageError                (75) nothing has worked for minutes; finished work is kept
    |   |-- StoreError                 the bucket, folder or credentials cannot be used
    |   |   |-- AccessDeniedError      credentials that have no right to this
    |   |   |-- UnorderedError         a bucket that has to be listed again, by one thread
    |   |   |-- UnusableNameError      one name cannot be read or written in a store
    |   |   `-- ManifestError          a list of objects that cannot be read
    |   |-- DataError, LayoutError, IndexFileError, ProtocolError, SourcesError, SplitError   data sets
    |   |   `-- UnreadableError        (2, or 75 if the store is to blame) one file cannot be read
    |   |-- NoDecoderError             (75) the processes that decode images cannot start
    |   |-- CardError, WeightsError, EngineError, CascadeError        run folders
    |   |-- DeviceError                a GPU that is not there, or does not compute
    |   |-- LoaderDiedError            (75) a process that loads a training's images was killed
    |   |-- NotFiniteError             a model's output is NaN or infinite: a failed row
    |   |-- RecipeError, SettingError, DivergedError, EnsembleError    training
    |   |-- RunTakenError              two trainings write one run
    |   |-- RunFolderError             a run folder that holds what would be lost
    |   |-- ImportConfigError, GraphError                             somebody else's detector
    |   |   `-- UnfitGraphError        a graph that is not as its description says
    |   |-- EvaluationError, ExplainError, VideoError, BoundError, BandError, PowerError    evaluation
    |   |-- QualityError               (3) a trained model is not good enough to publish
    |   |-- ArchiveError, VerifyError, ServerError                    serving
    |   |-- RegistryError              versions of a served model
    |   |   |-- AlreadyLoadedError     another `register` has loaded this version
    |   |   |-- ChangingError          (75) another command changes versions
    |   |   `-- ServerDownError        (75) the server does not answer
    |   |-- LabelError, AuditError, WebhookError, ScorerError, TrustError  scans
    |   |   `-- NotScoredError         labels of images without a score
    |   |-- CaseError                  the report on one image
    |   |   `-- CaseDiffersError       (3) a replay gives other figures
    |   |-- PlanError                  a scan's plan or its parts
    |   |   |-- RemovedPlanError       a scan's folder was removed
    |   |   |-- ClaimLostError         (75) another scan began at the same time
    |   |   |-- ScanUnderWayError      (75) named objects wait for a scan of the whole source
    |   |   `-- IncompleteScanError    shards are missing
    |   |-- ConfigurationError, ClusterError                          clusters
    |   |   `-- NotFoundError          an object that is not there
    |   |-- ShardsFailedError          (75) a Job ended and shards are missing
    |   `-- RejectedArchiveError       (1) a new archive did not become ready and was rolled back
    |       `-- NothingServesError     (1) and neither does any other
    |-- TransientError                 a call that may soon work: retried, then an OutageError or a failed row
    |-- StoppedError                   SIGTERM or Ctrl-C; finished work is kept
    |-- ObjectError                    one object cannot be read: a failed row
    |   `-- NotAFileError              a pipe, a link to nothing: a rejected row
    |-- BusyError                      an image for which other images left no time: HTTP 503
    |-- DecoderBugError                a bug of patchscan in a child process that decodes
    |-- RefusedRequestError            the server does not accept this image: a failed row
    |-- AlreadyExistsError, JobGoneError, ExpiredError    the cluster's state is not the expected one
    `-- ValueError
        |-- ImageError                 one image can never be scored: a rejected row
        |-- EventError                 a line or message that names no object: told, the others count
        |-- RequestError               a malformed request to the handler or the gate: HTTP 400
        `-- UnsafeNameError            a name that is no file inside its folder
"""

# The exit code of a command that a bug of patchscan has ended; its traceback is on standard error. Python's own would
# be 1, which means "done, some objects failed".
EXIT_BUG = 70
# The exit code of an interrupted command: finished work is kept, and the same command continues from there.
EXIT_INTERRUPTED = 75


class UserError(Exception):
    """An error that the user can fix: a wrong path, option or file. The message says what is wrong and what to do;
    `exit_code` is the exit code of the command."""

    exit_code = 2
