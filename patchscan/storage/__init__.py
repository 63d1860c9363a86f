"""Read and write objects in an S3 bucket or a local folder, through one protocol: `Store`."""

from patchscan.storage.store import Store, StoreError, check_address, is_bucket


def open_store(url: str, *, endpoint_url: str | None = None, requester_pays: bool = False, threads: int = 32) -> Store:
    """Open the store at `s3://bucket/prefix` or at a folder's path. It serves up to `threads` calls at once.

    Raises StoreError where `url` is neither, or empty.
    """
    check_address(url)
    from patchscan.storage.folder import Folder

    if is_bucket(url):
        from patchscan.storage.bucket import Bucket  # imports boto3, which folders do not need

        return Bucket(url, endpoint_url=endpoint_url, requester_pays=requester_pays, threads=threads)
    if "://" in url:
        raise StoreError(f"{url}: only s3://bucket/prefix URLs and folders are supported")
    return Folder(url)


def read_url(url: str, endpoint_url: str | None = None) -> bytes | None:
    """Return the bytes of an object or file, s3://... or a path; None where there is none. Raises StoreError."""
    folder, slash, name = url.rpartition("/")
    return open_store(folder or slash or ".", endpoint_url=endpoint_url).read(name)
