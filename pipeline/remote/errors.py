"""Errors of object stores: whether a retry may succeed, and what the user can do."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Final

_EXPIRED: Final = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken")
_UNKNOWN: Final = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidClientTokenId",
    "AuthorizationHeaderMalformed",
)
_DENIED: Final = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "401", "403")
_SKEWED: Final = ("RequestTimeTooSkewed", "RequestInTheFuture")
_NO_BUCKET: Final = ("NoSuchBucket", "InvalidBucketName")
_PASSING: Final = (
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout",
    "InternalError", "ServiceUnavailable", "IncompleteBody", "BadDigest", "OperationAborted", "XAmzContentSHA256Mismatch",
    "408", "409", "429", "500", "502", "503", "504",
)  # fmt: skip
_LASTING: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOSYS,
)  # fmt: skip
_NETWORK: Final = (
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "azure",
    "http",
    "requests",
    "ssl",
    "urllib3",
)
"""Packages whose errors are those of a connection, unless they are about credentials or settings."""
_CLOUDS: Final = ("azure", "gcsfs", "google")
_SAFE: Final = "Nothing is lost: what was computed lies in the local cache and is uploaded by the next run."


def is_missing(error: BaseException) -> bool:
    """Return whether a file is not there, in a bucket that is."""
    return isinstance(error, FileNotFoundError) and _code(error) not in _NO_BUCKET


def passes(error: BaseException) -> bool:
    """Return whether the same request may succeed a little later."""
    code = _code(error)
    if code:
        return code in _PASSING
    if _about_credentials(error) or isinstance(error, FileNotFoundError | PermissionError):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if type(error).__module__.split(".")[0] in _NETWORK:
        return not type(error).__name__.startswith(("ParamValidation", "Profile", "Unknown", "InvalidRegion"))
    return isinstance(error, OSError) and error.errno not in _LASTING


def complaint(error: BaseException, url: str, attempts: int) -> str:
    """Return what was found and what to do, without anything that the server was sent: it may hold credentials."""
    code = _code(error)
    if code in _EXPIRED:
        return f"{url}: the credentials have expired ({code}); renew them and run the same command again. {_SAFE}"
    if code in _UNKNOWN or _about_credentials(error):
        name = code or type(error).__name__
        return f"{url}: no valid credentials ({name}); set AWS_PROFILE or the keys of your provider. {_SAFE}"
    if code in _SKEWED:
        return (
            f"{url}: the clock of this host is off{_skew(error)}, so requests are refused ({code}); set it (`timedatectl "
            f"set-ntp true`) and run the same command again. {_SAFE}"
        )
    if code in _NO_BUCKET:
        return f"{url}: there is no such bucket ({code}); create it, or correct COHORT_STORE. {_SAFE}"
    if code in _DENIED or isinstance(error, PermissionError):
        return (
            f"{url}: access is denied ({code or 'permission'}); the store needs to read, write, list and delete below this "
            f"URL. {_SAFE}"
        )
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    return (
        f"{url} cannot be used{tried}: {code or type(error).__name__}: {_plain(error)}; run the same command again "
        f"when it can. {_SAFE}"
    )


def _plain(error: BaseException) -> str:
    """Return the error's text without the queries of URLs, which may be signed."""
    return re.sub(r"\?[^\s\"']*", "", str(error))[:300]


def _about_credentials(error: BaseException) -> bool:
    names = [type(one).__name__ for one in _causes(error)]
    return any("Credential" in name or "Token" in name or "GoogleAuth" in name for name in names)


def _causes(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _response(error: BaseException) -> dict[str, Any]:
    """Return the server's answer as botocore keeps it, empty where there is none."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _code(error: BaseException) -> str:
    """Return the server's name for the error, or its HTTP status; empty where there is neither."""
    named = str(_response(error).get("Error", {}).get("Code", ""))
    if named:
        return named
    if type(error).__module__.split(".")[0] in _CLOUDS:  # aiohttp has a `status` for what it could not parse, too
        status = getattr(error, "code", None) or getattr(error, "status_code", None)
        return str(status) if str(status).isdigit() else ""
    return ""


def _skew(error: BaseException) -> str:
    """Return by how much the clock is off, from the date of the server's answer."""
    date = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if not date:
        return ""
    seconds = time.time() - parsedate_to_datetime(date).timestamp()
    return f": it is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the server's"
