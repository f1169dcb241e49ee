"""Text that is shown or written: without control characters, and without credentials.

Everything that a run writes about its settings goes through :func:`without_credentials`: see ``base.config.grouped``,
``base.processes.command_line``, the log's formatter and ``UserError``.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from urllib.parse import unquote

# Control characters (ANSI codes begin with one), line breaks, marks that reverse the direction, half characters.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

AWS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_ACCESS_KEY_ID")
SECRET_VARIABLE = re.compile(
    r"(?i)(^|_)(secret|token|passwd|password|api_?key|account_?key|private_?key|access_?key|storage_?key|"
    r"connection_string)($|_id$)"
)
TOKENS = re.compile(  # of AWS, Hugging Face, GitHub, GitLab, OpenAI, Slack, Google; JSON web tokens
    r"\b((AKIA|ASIA)[A-Z0-9]{12,}|hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|xox[abpr]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
NAMED = re.compile(
    r"(?i)\b((?:[\w-]*(?:secret|passw(?:or)?d|signature|credential|authorization|(?:api|access).?key(?:.?id)?)[\w-]*"
    r"|[\w-]+[-_]token)\s*[=:]\s*|token=)(?:(?:Bearer|Basic)\s+)?[^\s,;&\"']+"
)
# Parts of a query that grant access; those of Azure are st=, se=, sp=, spr=, sv=, ...
SIGNED_QUERY = re.compile(
    r"(?i)(^|&)([^=&]*(x-amz-|x-goog-|x-ms-|awsaccesskeyid|googleaccessid|sig|secret|token|pass|pwd|auth|cred|key|policy|"
    r"session|jwt|code|expires|user)[^=&]*|s[a-z]{1,2})=|^[^=]{16,}$"
)
MARK = "***"
MARKED = re.compile(r"://\*\*\*@|\?\*\*\*(?=$|\s)")  # a URL that was written without its credentials


def one_line(text: str) -> str:
    """``text`` with control characters and line breaks escaped, so that names from data cannot steer a terminal."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def without_credentials(text: str, mark: str = "") -> str:
    """``text`` without passwords, keys, signatures and tokens.

    User names and signed queries are removed from URLs, other secrets become ``***``: the values of variables such as
    ``WANDB_API_KEY`` and ``HF_TOKEN``, passwords of proxies, tokens of known forms, and ``password: ...``. With a
    ``mark``, it stands where something was removed from a URL.
    """
    for secret in _secrets_of_environment(tuple(os.environ.items())):
        text = text.replace(secret, MARK)
    if "://" in text:
        user, query = (f"{mark}@", f"?{mark}") if mark else ("", "")
        text = re.sub(
            r"(\b(?:s3a?|gs|gcs)://)[^\s/@:]+:[^\s@]*@", rf"\1{user}", text
        )  # a secret of AWS may contain a /
        text = re.sub(r"(://)[^\s/?#\"']*@", rf"\1{user}", text)
        text = re.sub(
            r"(://[^\s?\"']*)\?([^\s\"']*)",  # outside of http(s) a ? is also a wildcard
            lambda found: found[1] + query if SIGNED_QUERY.search(found[2].rstrip(".,;:)")) else found[0],
            text,
        )
    return NAMED.sub(rf"\1{MARK}", TOKENS.sub(MARK, text))


@lru_cache(maxsize=4)  # asked for with each line of the log
def _secrets_of_environment(environment: tuple[tuple[str, str], ...]) -> list[str]:
    found = []
    for name, value in environment:
        # A shorter value is no real secret and would match parts of words.
        if len(value) >= (5 if name in AWS else 8) and (name in AWS or SECRET_VARIABLE.search(name)):
            found += [value] if name in AWS or not value.startswith(("/", "~")) else []
        if "://" in value:
            password = re.search(r"://[^\s/:@]*:([^\s/@]+)@", value)
            found += {password[1], unquote(password[1])} if password and len(password[1]) >= 5 else ()
    return sorted(found, key=len, reverse=True)
