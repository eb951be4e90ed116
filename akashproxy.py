#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""akashproxy: Akash Chat, and any OpenAI-compatible upstreams, as one OpenAI-compatible server.

One module, the standard library only, Python 3.9 or newer:

    python3 akashproxy.py              # serves Akash Chat on http://127.0.0.1:16571/v1
    python3 akashproxy.py --demo       # the same without a network

A client speaks OpenAI's API or Anthropic's to this file; it speaks the web API of Akash Chat, or
OpenAI's, to upstreams. A *controller* knows one upstream; a *pool* chooses one for each request.

    client                               akashproxy.py                              upstream
    ------  Handler -> Dialect.parse -> Call -> Exchange -> Controller -> Transport  ------
    socket                                                                           socket
            StreamRelay <- Dialect.encode <- Text, Reasoning, Image, Finish <- decoder
            EventLoop: the thread that owns every client socket, and each relayed upstream

Left of the events nothing knows which upstream answered; right of them nothing knows what the client
speaks. Between the sockets everything is pushed: ``decoder.feed(data)`` returns events,
``dialect.encode(events)`` returns bytes, and nothing in there reads, waits or knows a socket.
Where both sides speak the same format, the events are RawBytes.

There are two kinds of threads. The *loop* reads requests whole, writes responses and relays streams; it
never blocks. *Workers* get one whole request each: they parse it, choose a controller and send the
request to the upstream, and may block in that. A streamed chat:

    1 loop    accept: Connection(IDLE). Head and body complete: DISPATCHED, submit()
    2 worker  Handler.parse_request, do_POST: the body becomes a Call
    3 worker  CallResponder.attempt: Exchange chooses a controller, which sends the request
    4 worker  call_soon_threadsafe(StreamRelay.start); the worker is free
    5 loop    bytes of the upstream become events; with the first one the response begins (STREAMING)
    6 loop    back-pressure, pings, disconnects, deadlines
    7 loop    a failure before 5: submit(fail_over), back to 3; afterwards: an error frame
    8 loop    the end: access log, metrics, Connection(IDLE)

The sections, from top to bottom (``grep '^# ==' akashproxy.py``):
names, errors, events, settings, http, transport, controllers, pool, dialects, loop, relay, limits,
server, demo, page, main.

Where is ...

    a setting                          Settings, ControllerSettings
    the configuration file             ConfigFile, find_config
    an error and its form on the wire  APIError, Dialect.error_body
    what an upstream's error means     UPSTREAM_ERRORS, error_from_body, akash_error
    what hides secrets                 redact
    Akash's cookie                     AkashSession
    Akash's stream, line by line       AkashDecoder
    what is sent to Akash              akash_request
    images                             AkashController.image_events
    <think> tags                       ThinkTagFilter
    stop sequences and max_tokens      StopFilter
    OpenAI's stream                    ChatDecoder
    Anthropic's stream                 Messages
    OpenAI's newer stream              Responses
    their requests as a chat           Messages.to_chat, Responses.to_chat, BlockDialect.convert_part
    estimates of tokens                estimate_tokens
    relaying unparsed                  PassthroughDecoder, Passthrough
    failover                           Exchange
    cool-downs                         FAILURE_POLICY, CoolDown, Upstream.record_result
    waiting for a controller           CallQueue
    the choice by weight               Pool.weighted_round_robin
    aliases of models                  Pool.resolve_alias
    the network's exceptions           upstream_error, UpstreamResponse.to_api_error
    strict HTTP                        find_head_end, parse_head, BodyDecoder
    connections to upstreams           ConnectionPool
    proxies on the way                 Proxy
    deadlines                          CancelScope, Connection.on_tick
    request bodies                     BodyReader, ByteBudget
    the gate                           Gate.check_head
    figures for Prometheus             METRICS, Metrics, prometheus_text
    a client's connection              Connection
    the log                            log_access, LogFormat, LogWriter
    a new endpoint                     ROUTES
    a new kind of upstream             CONTROLLERS
    tokens of clients                  Gate.authorize
    keys of several people             ClientKeySettings, KeyLimiter
    reloading                          Server.reload
    the stand-in of --demo             DemoAkash
    the page at /                      PAGE, page
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and hasattr(signal, "pthread_sigmask"):
    # Before anything else: a signal that comes while the file is still loading would end the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

# == 1. names =================================================================================
# What the rest of the file, and whoever imports it, can refer to. Importing starts nothing.

import base64
import binascii
import bisect
import collections
import contextlib
import dataclasses
import enum
import errno
import fnmatch
import functools
import gc
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import select
import selectors
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from queue import Empty, Full, Queue, SimpleQueue
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Set,
    Tuple,
)

__version__ = "1.0.0"

__all__ = [
    "APIError",
    "ConfigError",
    "ClientDisconnected",
    "ProtocolError",
    "Call",
    "Text",
    "Reasoning",
    "TextWasReasoning",
    "ToolCall",
    "Image",
    "ImageProgress",
    "Finish",
    "RawBytes",
    "Answer",
    "fold",
    "Settings",
    "ControllerSettings",
    "ClientKeySettings",
    "Controller",
    "AkashController",
    "AkashSession",
    "AkashDecoder",
    "OpenAIController",
    "ChatDecoder",
    "PassthroughDecoder",
    "EchoController",
    "ThinkTagFilter",
    "StopFilter",
    "CONTROLLERS",
    "Pool",
    "Dialect",
    "ChatCompletions",
    "Completions",
    "Images",
    "Messages",
    "CountTokens",
    "Responses",
    "Passthrough",
    "ROUTES",
    "Server",
    "main",
]

log = logging.getLogger("akashproxy")

Event = Any  # one of the classes at the head of section 3


MAX_JSON_VALUES = (
    100_000  # of one text; each may take several hundred bytes of memory, however short it is
)
MAX_RELAYED_VALUES = 1_000_000  # of one that is only relayed, such as embeddings of token ids
MAX_JSON_DEPTH = (
    500  # levels of nesting: below where any Python's recursion ends, reading or writing
)


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8, with Unicode's line breaks escaped; what can't be encoded (half a surrogate pair) becomes "?".

    Several clients split a stream where str.splitlines() does, so a raw U+2028, U+2029 or U+0085 would end an event's line.
    """
    text = _encode(value)
    if not text.isascii() and ("\u2028" in text or "\u2029" in text or "\x85" in text):
        text = (
            text.replace("\u2028", r"\u2028")
            .replace("\u2029", r"\u2029")
            .replace("\x85", r"\u0085")
        )
    return text.encode("utf-8", "replace")


def from_json(data: bytes, max_values: int = MAX_JSON_VALUES) -> Any:
    """The value of a JSON text in UTF-8. ValueError for NaN, infinite numbers, bad UTF-8, too many values or levels."""
    check_json(data, max_values)
    return _parse(data)


def _parse(data: bytes) -> Any:
    data = data[3:] if data[:3] == b"\xef\xbb\xbf" else data
    try:
        return (
            _decode(data.decode())
            if len(data) < LARGE_JSON or data.isascii()
            else _parse_apart(data)
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# A character beyond ASCII makes all of its string take two or four bytes a character: ten times the size of a text that
# is decoded whole, parsed and encoded again. So long strings are taken out and read and written in slices.

LARGE_JSON = 1 << 20  # bytes of a text with which that is done; it takes more time
LONG_STRING = 256  # bytes or characters; of MAX_JSON_VALUES shorter ones no large text can be made
STRING_SLICE = 1 << 16


def _parse_apart(data: bytes) -> Any:
    """The value of a large JSON text."""
    strings, parts, at, nonce = {}, [], 0, os.urandom(12).hex()
    for number, cuts in enumerate(_long_strings(data)):
        text = bytearray()
        for begin, end in zip(cuts, cuts[1:]):
            text += _decode('"%s"' % data[begin:end].decode()).encode("utf-8", "surrogatepass")
        mark = f"{nonce}{number};"
        strings[mark] = text.decode("utf-8", "surrogatepass")
        parts += data[at : cuts[0]], mark.encode()
        at = cuts[-1]
    value = _decode(b"".join([*parts, data[at:]]).decode())
    for container, key, text in _strings_in(value):
        if text in strings:
            container[key] = strings[text]
    return value


def _long_strings(data: bytes) -> List[List[int]]:
    """Where the long strings of a JSON text begin, may be cut, and end. Names of fields are left out."""
    if (
        b"\\" in data
    ):  # so that quotes are ends of strings and backslashes begin escapes; nothing moves
        data = data.replace(b"\\\\", b"\\_").replace(b'\\"', b"\\_")
    spans = [
        found.span(1)
        for found in re.finditer(rb'"([^"]*)"(\s*:)?', data)
        if found.end() - found.start() > LONG_STRING and found[2] is None
    ]
    return [_cuts(data, begin, end) for begin, end in spans]


def _cuts(data: bytes, begin: int, end: int) -> List[int]:
    """Places between the characters of a string: no character, escape or pair of escapes is cut."""
    cuts = [begin]
    while end - cuts[-1] > STRING_SLICE:
        at = cuts[-1] + STRING_SLICE
        while (
            data[at] & 0xC0 == 0x80 and at > cuts[-1] + STRING_SLICE - 4
        ):  # more of them are an error wherever they are cut
            at -= 1
        escape = data.rfind(b"\\", at - 5, at)
        at = escape if escape >= 0 else at
        cuts.append(at - 6 if _PAIR.match(data, at - 6) else at)
    return [*cuts, end]


_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")


def _strings_in(value: Any) -> Iterator[Tuple[Any, Any, str]]:
    """(container, key, text) of each string within a value."""
    left = [value]
    while left:
        item = left.pop()
        for key, inner in (
            item.items()
            if isinstance(item, dict)
            else enumerate(item)
            if isinstance(item, list)
            else ()
        ):
            if isinstance(inner, str):
                yield item, key, inner
            else:
                left.append(inner)


def request_json(value: Any, size: int) -> bytes:
    """What to_json() gives, for the body of a request that was so large; no other thread may use the value meanwhile."""
    targets = [
        target
        for target in _strings_in(value if size > LARGE_JSON else None)
        if len(target[2]) > LONG_STRING and not target[2].isascii()
    ]
    if not targets:
        return to_json(value)
    nonce = os.urandom(12).hex()
    try:
        for number, (container, key, _) in enumerate(targets):
            container[key] = f"{nonce}{number};"
        data = to_json(value)
    finally:
        for container, key, text in targets:
            container[key] = text
    output, at = bytearray(), 0
    for mark in re.finditer(b"%b([0-9]+);" % nonce.encode(), data):
        text = targets[int(mark[1])][2]
        output += data[at : mark.start()]
        for cut in range(0, len(text), STRING_SLICE):
            output += to_json(text[cut : cut + STRING_SLICE])[1:-1]
        at = mark.end()
    output += data[at:]
    return bytes(output)


def check_json(data: bytes, max_values: int) -> None:
    """ValueError if a JSON text has too many values or levels, found without parsing it.

    Each value follows an opening bracket or a comma, so their number bounds the number of values. Those within
    strings are counted as well if even that stays below the limits; else the strings are taken out first.
    """
    if len(data) <= 2 * MAX_JSON_DEPTH:  # it has too few brackets
        return
    openings = data.count(b"[") + data.count(b"{")
    if openings <= MAX_JSON_DEPTH and openings + data.count(b",") < max_values:
        return
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(
            b'\\"', b""
        )  # what is left of quotes begins or ends a string
    marks = data.translate(None, _NO_MARKS)
    many = (
        marks.count(b'"') > 4 * max_values
    )  # a value has at most two strings, its name and itself
    marks = b"" if many else _outside_strings(marks.replace(b'""', b""))
    if many or len(marks) - marks.count(b"]") - marks.count(b"}") >= max_values:
        raise ValueError(f"it has more than {max_values} values, which is the limit")
    levels = itertools.accumulate(memoryview(marks.translate(_STEPS, b",")).cast("b"))
    if max(levels, default=0) > MAX_JSON_DEPTH:
        raise ValueError("it is nested too deeply")


def _outside_strings(marks: bytes) -> bytes:
    """What is not between quotes; in steps, as a part of a split takes a hundred bytes of memory."""
    found = bytearray()
    while marks:
        parts = marks.split(b'"', 100_000)
        marks = parts.pop() if len(parts) > 100_000 else b""
        found += b"".join(parts[::2])
    return bytes(found)


_NO_MARKS = bytes(set(range(256)) - set(b'"[]{},'))
_STEPS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # up and, as signed bytes, down a level


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """A number with a fraction or an exponent. Beyond a float's range it would be Infinity, which is not JSON."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shorten(digits, 40)} is too large")
    return value


def _finite_or_none(digits: str) -> Optional[float]:
    value = float(digits)
    return None if math.isinf(value) else value


def _integer(digits: str) -> int:
    """An integer, on a Python that does not itself limit their length: converting takes the square of it."""
    if len(digits) > 4300:
        raise ValueError("it has an integer of more than 4300 digits")
    return int(digits)


_parse_int: Any = int if hasattr(sys, "get_int_max_str_digits") else _integer
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_decode = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_finite, parse_int=_parse_int
).decode
_decode_any = json.JSONDecoder(
    parse_constant=lambda name: None, parse_float=_finite_or_none, parse_int=_parse_int
).decode


def shorten(text: str, limit: int = 200) -> str:
    """A text that others chose, for a log line or a message: cut, as it may be of any length."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def count_or_none(value: Any) -> Optional[int]:
    """A number of an upstream if it can be a count (0 <= n < 2^53, so that every client can read it), else None."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def new_id() -> str:
    """24 random hexadecimal digits, to tell things apart."""
    return "%024x" % random.getrandbits(96)


def start_thread(target: Callable[[], None], name: str) -> bool:
    """Start a daemon thread; False if the machine has no room for one more."""
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    except RuntimeError as error:
        log.error("no thread for %s: %s", name, error)
        return False
    return True


def utc(moment: float) -> str:
    """A time by time.time() as RFC 3339 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def json_or_none(data: bytes) -> Any:
    """The value of a JSON text; None if it is something else."""
    try:
        return from_json(data)
    except ValueError:
        return None


def as_dict(value: Any) -> Dict[str, Any]:
    """The value if it is an object, else an empty one: what others send may be anything."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> List[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


# == 2. errors ================================================================================
# One exception for all that a client is to be told. It knows a status and a sentence, no wire.

ERROR_TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}
CATEGORY_BY_STATUS = {
    400: "request",
    413: "request",
    422: "request",
    404: "model",
    408: "limit",
    409: "limit",
    425: "limit",
    429: "limit",
}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 413: "request_too_large"}


class APIError(Exception):
    """What went wrong, as the client is to read it.

    ``retry_after`` is in seconds. ``retry=False`` tells clients that trying again is useless (they
    repeat every 5xx otherwise); ``legacy_message`` replaces the message where akashchat-api-go's users
    expect a fixed text. ``category`` tells the pool what follows (FAILURE_POLICY); ``cooldown_scope`` is what a
    cool-down that follows applies to: the whole "controller", or the "model" of the request.
    ``upstream_status`` is the status that the upstream itself sent, if it sent one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: Optional[str] = None,
        code: Optional[str] = None,
        param: Optional[str] = None,
        retry_after: Optional[float] = None,
        retry: Optional[bool] = None,
        legacy_message: Optional[str] = None,
        category: Optional[str] = None,
        cooldown_scope: str = "controller",
        upstream_status: Optional[int] = None,
    ) -> None:
        self.message = message = shorten(
            message, 1500
        )  # it goes to logs and /status, and quotes what others sent
        super().__init__(message)
        self.status = status
        self.type = type or ERROR_TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.code = code or ERROR_CODES.get(status)
        self.param = param
        self.retry_after = retry_after
        self.retry = retry
        self.legacy_message = legacy_message or message
        self.category = category or CATEGORY_BY_STATUS.get(status, "server")
        self.cooldown_scope = cooldown_scope
        self.bug: Optional[Exception] = None  # the exception behind it that was not foreseen
        self.upstream_status = upstream_status

    def headers(self) -> Dict[str, str]:
        """The header fields that belong to the error, whatever the dialect."""
        fields = {}
        if self.retry_after is not None:
            fields["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.retry is not None or self.status in (
            401,
            403,
        ):  # Claude Code repeats even these for minutes
            fields["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            fields["WWW-Authenticate"] = "Bearer"
        return fields


class ConfigError(Exception):
    """Settings that can't be used; ``problems`` has a sentence for each."""

    def __init__(self, problems: List[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ClientDisconnected(ConnectionError):
    """The client closed its connection, so nobody waits for the answer any more."""


class Queued(Exception):
    """The call waits in the pool's queue; it goes on when ``call.wake`` is called."""


class ProtocolError(ValueError):
    """A message that is not HTTP/1.1 as it should be; ``status`` is what a client would be told."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def bad_request(message: str, param: Optional[str] = None, code: Optional[str] = None) -> APIError:
    """The client's own mistake, with the field that it is in."""
    return APIError(400, message, param=param, code=code)


def model_not_found(model: str) -> APIError:
    """No such model here, or not for this client."""
    message = f"The model {shorten(model)!r} does not exist." if model else "A model must be named."
    return APIError(404, message, param="model", code="model_not_found")


def akash_model_not_found(model: str) -> APIError:
    """No such model at Akash Chat: 500 "Error Model.", as akashchat-api-go answered."""
    return APIError(
        500,
        f"The model {shorten(model)!r} does not exist or is not available at Akash Chat.",
        type="invalid_request_error",
        param="model",
        code="model_not_found",
        retry=False,
        legacy_message="Error Model.",
        category="model",
    )


# == 3. events ================================================================================
# The vocabulary inside: a Call goes in, events come out. Knows neither HTTP nor any wire format.


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class TextWasReasoning:
    """All Text so far was Reasoning after all. A stream can't take it back; who waits for the whole can."""


@dataclass(frozen=True)
class ToolCall:
    """A fragment of a call of a tool; the first one of an index carries id and name."""

    index: int
    arguments: str = ""
    id: Optional[str] = None
    name: Optional[str] = None


@dataclass(frozen=True)
class Image:
    """A finished picture: the job that made it, its file name, its address at the upstream, its bytes if asked for."""

    job: str
    prompt: str
    name: str
    url: str
    data: Optional[bytes] = None


@dataclass(frozen=True)
class ImageProgress:
    """A picture is not ready yet: the state of its job and its place in the queue (0: being made)."""

    status: str
    position: int = 0


@dataclass(frozen=True)
class Finish:
    """The answer is whole: why it ended (OpenAI's finish_reason), the tokens if the upstream told them, and the
    stop sequence that ended it, if that is known."""

    reason: str
    usage: Optional[Dict[str, int]] = None
    stop_sequence: Optional[str] = None


@dataclass(frozen=True)
class RawBytes:
    """Bytes in the client's own dialect, passed on as they are."""

    data: bytes


EVENTS = Text, Reasoning, TextWasReasoning, ToolCall, Image, ImageProgress, Finish, RawBytes


class CancelScope:
    """A socket that another thread may end: which, until when, and what follows from its end.

    The owner calls attach(), set_deadline() and detach(); the watchdog, or whoever cancels, calls cancel().
    A blocked recv() then returns, and raise_if_cancelled() raises the reason in the owner's thread.
    """

    __slots__ = ("sock", "deadline", "timeout_message", "reason", "shutdown_how")
    active: set = set()  # all that hold a socket

    def __init__(self) -> None:
        self.sock: Any = None
        self.deadline = math.inf  # by time.monotonic()
        self.timeout_message = ""  # what it means when that moment passes
        self.reason: Optional[Exception] = None
        self.shutdown_how = socket.SHUT_RDWR

    def attach(self, sock: Any) -> None:
        self.sock = (
            sock  # before raise_if_cancelled(): cancel() sets why first and looks at sock second
        )
        CancelScope.active.add(self)
        self.raise_if_cancelled()

    def detach(self) -> None:
        CancelScope.active.discard(self)
        self.sock, self.deadline = None, math.inf

    def set_deadline(self, seconds: float, timeout_message: str) -> None:
        self.timeout_message, self.deadline = timeout_message, time.monotonic() + seconds

    def raise_if_cancelled(self) -> None:
        if self.reason is not None:
            raise self.reason

    def cancel(self, reason: Exception) -> None:
        if self.reason is None:
            self.reason = reason
        self.deadline, sock = math.inf, self.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it was closed meanwhile: then nobody blocks in it
                socket.socket.shutdown(
                    sock, self.shutdown_how
                )  # on a TLS socket its own shutdown() would not do


CHAT_PATH = "/v1/chat/completions"
MAX_NAME = (
    256  # characters of a model's name: it stands in every event of a stream, in logs and in lists
)


class Call:
    """A request on its way through: what is asked, in OpenAI's chat vocabulary, and what became of it."""

    def __init__(
        self,
        body: Dict[str, Any],
        stream: bool = False,
        relay_only: bool = False,
        image_count: int = 0,
        images_as_bytes: bool = False,
        translation_error: Optional[APIError] = None,
    ) -> None:
        self.body = body  # a chat-completions body, whatever the client spoke
        self.model: str = body.get("model", "")
        if len(self.model) > MAX_NAME:
            raise model_not_found(self.model)
        self.stream = stream
        self.relay_only = relay_only  # nothing else can be done with it
        self.image_count = image_count  # how many are wanted; 0: this is a chat
        self.images_as_bytes = images_as_bytes  # as bytes rather than as an address
        self.translation_error = translation_error  # why it can't be translated, only relayed
        self.path = CHAT_PATH
        self.query = ""  # the request's, for a relay
        self.headers: Dict[str, str] = {}  # the few of the client's that a relay passes on
        self.original_body: Optional[Dict[str, Any]] = (
            None  # the client's own body, for an upstream that speaks its format,
        )
        self.raw_body = b""  # the same as it came,
        self.content_type = "application/json"  # and what that is
        self.allowed_models: Tuple[
            str, ...
        ] = ()  # patterns of the models that it may be answered by; (): all
        self.untranslated: List[
            str
        ] = []  # what a chat has no place for, if the client spoke something else
        self.ignored_params: List[str] = []  # fields that the controller could not honour
        self.attempts: Tuple[str, ...] = ()  # who was asked and what came, "akash=429"
        self.answered_by = ""  # who answered
        self.relay_content_type: Optional[str] = (
            None  # the content type of an answer that is relayed,
        )
        self.relay_status = 200  # and its status
        self.scope = CancelScope()  # the exchange with the upstream
        self.cancel_reason: Optional[Exception] = None  # what ended it from outside
        self.wakeup: Any = None  # an Event that ends a pause, or the Waiter
        self.waiter: Any = None  # its place in the pool's queue
        self.wake: Callable[[], None] = lambda: None  # goes on with it after Queued; any thread
        self.client_has_left: Callable[[], bool] = lambda: (
            False
        )  # whether the client has closed its connection
        self.one_image_at_a_time = (
            False  # at most one job at a time, for a limit that counts requests
        )
        self.retry_reason = (
            ""  # why the same controller is asked once more: "session" or "connection" has ended
        )
        self.prepared_requests: Dict[str, Any] = {}  # what a controller has made of it, by its name

    def cancel(self, reason: Optional[Exception] = None) -> None:
        """End it from outside: the upstream's socket is shut down, sleep() returns."""
        self.cancel_reason = reason or ClientDisconnected(
            "the client left"
        )  # first: new_scope() and sleep() look at it last
        self.scope.cancel(self.cancel_reason)
        if self.wakeup:
            self.wakeup.set()

    def new_scope(self) -> None:
        """A new watch for the next upstream: the last one may have been ended."""
        self.scope = CancelScope()
        if self.cancel_reason:
            self.scope.cancel(self.cancel_reason)

    def raise_if_cancelled(self) -> None:
        """Raise the reason why it was cancelled. Peeks at the client itself: the loop may not have had the time to."""
        if not self.cancel_reason and self.client_has_left():
            self.cancel()
        self.scope.raise_if_cancelled()

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than somebody waits for the answer."""
        self.wakeup = self.wakeup or threading.Event()
        if not self.cancel_reason:
            self.wakeup.wait(seconds)
        self.scope.raise_if_cancelled()


@dataclass
class Answer:
    """A whole answer, for clients that do not stream."""

    text: str = ""
    reasoning: str = ""
    tools: List[ToolCall] = field(default_factory=list)
    images: List[Image] = field(default_factory=list)
    finish: Optional[Finish] = None
    raw: bytes = b""


def fold(events: Iterable[Event]) -> Answer:
    """Add the events of one answer up."""
    answer, text, reasoning, raw, tools = Answer(), [], [], [], {}
    for event in events:
        if isinstance(event, Text):
            text.append(event.text)
        elif isinstance(event, Reasoning):
            reasoning.append(event.text)
        elif isinstance(event, TextWasReasoning):
            reasoning.append("".join(text).rstrip("\n"))
            text.clear()
        elif isinstance(event, ToolCall):
            # by its text: an upstream can choose integers that share one hash
            tools.setdefault("%x" % event.index, []).append(event)
        elif isinstance(event, Image):
            answer.images.append(event)
        elif isinstance(event, Finish):
            answer.finish = event
        elif isinstance(event, RawBytes):
            raw.append(event.data)
    answer.text, answer.reasoning, answer.raw = "".join(text), "".join(reasoning), b"".join(raw)
    answer.tools = sorted(map(join_tool_call, tools.values()), key=lambda call: call.index)
    return answer


def join_tool_call(fragments: List[ToolCall]) -> ToolCall:
    """A call of a tool from its fragments."""
    return ToolCall(
        fragments[0].index,
        "".join(each.arguments for each in fragments),
        next((each.id for each in fragments if each.id), None),
        next((each.name for each in fragments if each.name), None),
    )


class ThinkTagFilter:
    """Take ``<think>...</think>`` out of plain text: Text in, Text and Reasoning out.

    The tags may be cut anywhere. An opening tag counts where nothing but blanks came before it, for
    later on it is more likely a word of the answer. Some models never send it (think-noopen): a
    closing tag that was never opened makes what came before it a thought, unless it stands in
    quotes. What has left by then is told to be one by TextWasReasoning. A tag that is never closed
    (think-unclosed) makes the rest a thought. The line breaks around the tags go.
    """

    OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
    QUOTES = ("`", "'", '"')
    MAX_BLANKS = 256  # so many at most belong to a tag: what is held back is copied with each piece

    def __init__(self) -> None:
        self.pending = ""  # may be the beginning of a tag, or of the line break before one
        self.last_char = ""  # the last character that was passed on
        self.strip_newlines = False  # the line breaks after a tag are still to come
        self.state = self._at_start

    def feed(self, events: List[Event]) -> List[Event]:
        if len(events) == 1 and type(events[0]) is Text and self.is_passthrough(events[0].text):
            return events
        out: List[Event] = []
        for event in events:
            if isinstance(event, Text):
                self._text(event.text, out)
            else:
                if isinstance(event, Finish):
                    out += self.close()
                out.append(event)
        return out

    def is_passthrough(self, text: str) -> bool:
        """Does a text go through as it is? Most do, once an answer has begun."""
        if (
            text
            and self.last_char
            and not self.strip_newlines
            and not self.pending
            and "<" not in text
        ):
            self.last_char = text[-1]
            return True
        return False

    def close(self) -> List[Event]:
        """What was held back is no tag after all."""
        text, self.pending = self.pending, ""
        kind = Reasoning if self.state == self._in_reasoning else Text
        return [kind(text)] if text else []

    def _text(self, text: str, out: List[Event]) -> None:
        text, self.pending = self.pending + text, ""
        while text:
            if self.strip_newlines:
                text = text.lstrip("\n")
                self.strip_newlines = not text
            text = self.state(text, out)

    def _at_start(self, text: str, out: List[Event]) -> str:
        """Nothing has come yet: is this the opening tag?"""
        lead = text.lstrip()
        if lead.startswith(self.OPEN_TAG) and len(text) - len(lead) <= self.MAX_BLANKS:
            self.state, self.strip_newlines = self._in_reasoning, True
            return lead[len(self.OPEN_TAG) :]
        if self.OPEN_TAG.startswith(lead) and len(text) - len(lead) <= self.MAX_BLANKS:
            self.pending = text
            return ""
        self.state = self._in_answer
        return text

    def _in_reasoning(self, text: str, out: List[Event]) -> str:
        reasoning, tag, rest = text.partition(self.CLOSE_TAG)
        if tag:
            self.state, self.strip_newlines = self._emit, True
            reasoning = self._strip_line_breaks(reasoning)
        else:
            reasoning = self._split_partial_tag(text)
        if reasoning:
            out.append(Reasoning(reasoning))
        return rest

    def _in_answer(self, text: str, out: List[Event]) -> str:
        """The answer, so far without a tag: was it a thought?"""
        at = text.find(self.CLOSE_TAG)
        if at >= 0:
            self.state = self._emit
            if (text[at - 1] if at else self.last_char) in self.QUOTES:
                return text
            self.strip_newlines, before = True, text[:at]
            reasoning = before.rstrip("\n")
            if self.last_char:
                out += [Text(before), TextWasReasoning()] if before else [TextWasReasoning()]
            elif reasoning:
                out.append(Reasoning(reasoning))
            return text[at + len(self.CLOSE_TAG) :]
        return self._emit(self._split_partial_tag(text), out)

    def _emit(self, text: str, out: List[Event]) -> str:
        if text:
            self.last_char = text[-1]
            out.append(Text(text))
        return ""

    def _split_partial_tag(self, text: str) -> str:
        """Keep the end of the text that may become a closing tag, and the line breaks before it."""
        cut = len(text) - (partial_match_length(text, self.CLOSE_TAG) if "<" in text else 0)
        if self.state == self._in_reasoning:
            cut = len(self._strip_line_breaks(text[:cut]))
        self.pending = text[cut:]
        return text[:cut]

    def _strip_line_breaks(self, reasoning: str) -> str:
        """A thought without the line breaks at its end."""
        return reasoning[: max(len(reasoning.rstrip("\n")), len(reasoning) - self.MAX_BLANKS)]


def partial_match_length(text: str, word: str) -> int:
    """How many characters at the end of a text may be the beginning of a word, which is a short one."""
    return next(
        (
            size
            for size in range(min(len(word) - 1, len(text)), 0, -1)
            if text.endswith(word[:size])
        ),
        0,
    )


class Search:
    """Look for a word in a text that comes in pieces, in a time in proportion to the text (Knuth, Morris and Pratt)."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.size = 0  # so much of its beginning stands at the end of the text
        self.borders = [
            0
        ]  # by size: the longest beginning of the word that also stands at the end of that part
        for char in word[1:]:
            self.borders.append(self._grown(self.borders[-1], char))

    def feed(self, text: str) -> int:
        """Where in the text the word first ends; -1 if it does not."""
        at, last = (
            0,
            len(text) - len(self.word) + 1,
        )  # what begins before that is whole, or not the word
        while at < len(text):
            if not self.size:
                if at < last:
                    found = text.find(self.word, at)
                    if found >= 0:
                        return found + len(self.word)
                at = text.find(self.word[0], max(at, last))
                if at < 0:
                    break
            self.size = self._grown(self.size, text[at])
            at += 1
            if self.size == len(self.word):
                return at
        return -1

    def _grown(self, size: int, char: str) -> int:
        """How much of the word's beginning stands at the end, after so much of it and one more character."""
        while size and self.word[size] != char:
            size = self.borders[size - 1]
        return size + (self.word[size] == char)


class StopFilter:
    """End an answer at a stop sequence or at a number of tokens, for an upstream that can do neither.

    Stop sequences may be cut anywhere; they are not part of the answer. The one that ends first counts,
    the longest of those that end together. Tokens are counted by token_units(), so that the end comes
    rather late than early.
    """

    def __init__(self, stops: List[str], max_tokens: Optional[int]) -> None:
        self.stops = list(map(Search, stops))
        self.pending = "", 0  # a stop sequence, and how much of its beginning is held back
        self.budget = math.inf if max_tokens is None else UNITS_PER_TOKEN * max_tokens
        self.needed = bool(stops) or max_tokens is not None
        self.stopped = False  # the answer was ended here

    def is_passthrough(self, text: str) -> bool:
        return False

    def feed(self, events: List[Event]) -> List[Event]:
        out: List[Event] = []
        for event in events:
            if self.stopped:
                break
            if isinstance(event, Text) and self.stops:
                self._search(event.text, out)
            elif isinstance(event, (Text, Reasoning)):
                self._count(event, out)
            else:
                if isinstance(event, (Finish, TextWasReasoning)):
                    out += self.close()
                out.append(event)
        return out

    def close(self) -> List[Event]:
        (stop, size), self.pending = self.pending, ("", 0)
        for search in self.stops:
            search.size = 0
        return [Text(stop[:size])] if size else []

    def _search(self, text: str, out: List[Event]) -> None:
        (pending, size), self.pending = self.pending, ("", 0)
        ends = [(search.feed(text), search.word) for search in self.stops]
        end, length, stop = min(
            ((end, -len(word), word) for end, word in ends if end >= 0), default=(len(text), 0, "")
        )
        if not stop:
            longest = max(self.stops, key=lambda search: search.size)
            self.pending, length = (longest.word, longest.size), -longest.size
        emitted = size + end + length  # of what was held back, and of the text after it
        self._count(Text(pending[: min(size, emitted)] + text[: max(0, emitted - size)]), out)
        if stop and not self.stopped:
            self.stopped = True
            out.append(Finish("stop", stop_sequence=stop))

    def _count(self, event: Event, out: List[Event]) -> None:
        if not event.text:
            return
        cost = token_units(event.text)
        if cost > self.budget:
            head = truncate_to(event.text, self.budget)
            if head:
                out.append(type(event)(head))
            out.append(Finish("length"))
            self.stopped = True
        else:
            self.budget -= cost
            out.append(event)


UNITS_PER_TOKEN = 24
SLICE = (
    1 << 16
)  # characters that are counted at a time: that bounds the memory, and other threads run in between
_WIDE = re.compile("[\u2e80-\U0010ffff]+")


def token_units(text: str) -> int:
    """How many 24ths of a token a text has at least: 8 ASCII characters, 6 of other alphabets or 2 of East Asia make one.

    Measured with the tokenizers cl100k and o200k, from which prose has 4 to 7, 2 to 5 and 1 to 1.5.
    """
    if text.isascii():
        return len(text) * 3
    if len(text) > SLICE:
        return sum(token_units(text[at : at + SLICE]) for at in range(0, len(text), SLICE))
    plain = len(text.encode("ascii", "ignore"))
    wide = len(text) - len(_WIDE.sub("", text))
    return plain * 3 + (len(text) - plain - wide) * 4 + wide * 12


IMAGE_TOKENS = 1600  # what Anthropic counts for a large one


def estimate_tokens(value: Any) -> int:
    """About how many tokens the texts within any JSON value are: twice the least, and IMAGE_TOKENS for each file in it."""
    parts, files, left = 0, 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            parts += sum(map(token_units, item))
            if item.get("type") == "base64":
                files, item = files + 1, {**item, "data": None}
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str) and item.startswith("data:"):
            files += 1
        elif item is not None:
            parts += token_units(str(item))
    return parts * 2 // UNITS_PER_TOKEN + IMAGE_TOKENS * files + 1


def truncate_to(text: str, budget: float) -> str:
    for size, char in enumerate(text):
        budget -= token_units(char)
        if budget < 0:
            return text[:size]
    return text


# == 4. settings ==============================================================================
# Each setting is declared once; its environment variable, its flag, --help and --check follow from
# that line. Knows nothing that runs.


def setting(
    default: Any,
    help: str,
    check: Callable[[Any], Any] = lambda value: value,
    secret: bool = False,
    also: str = "",
) -> Any:
    """A setting: ``check`` returns the value to use, or raises ValueError; ``also`` is a second environment variable."""
    start: Any = {"default_factory": dict} if default == {} else {"default": default}
    return field(
        **start,
        repr=not secret,
        metadata={"help": help, "check": check, "secret": secret, "also": also},
    )


def address(text: str) -> str:
    """Check "host:port", ":port" or "[v6]:port"."""
    split_address(text)
    return text


def split_address(text: str) -> Tuple[str, int]:
    """The host ("" for all interfaces) and the port of an address; localhost is 127.0.0.1."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r} has no port")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{port!r} is no port")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address as [{host}]:{port}")
    check_host(host)
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def check_host(host: str) -> None:
    """ValueError unless a host name can be looked up (IDNA)."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{host!r} is no host name") from None


def base_url(text: str) -> str:
    """Check an http(s) address, and take its trailing slash off."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is no http:// or https:// address")
    if (
        parts.query
        or parts.fragment
        or parts.username is not None
        or not re.fullmatch(r"[!-~]+", text)
    ):
        raise ValueError("only scheme, host, port and path are allowed")
    check_host(parts.hostname)
    if parts.port == 0:  # .port itself raises ValueError above 65535
        raise ValueError("0 is no port")
    return text.rstrip("/")


def header_value(text: str) -> str:
    """Check that a text can stand in a header field."""
    if not re.fullmatch(r"[ -~]*", text) or text != text.strip():
        raise ValueError("only printable ASCII without blanks at the ends is allowed")
    return text


def nonempty_header_value(text: str) -> str:
    """Check one of several: an empty one would match a client that sends none."""
    if not text:
        raise ValueError("one of the values is empty")
    return header_value(text)


def optional_url(text: str) -> str:
    """Check an http(s) address, or none."""
    return base_url(text) if text else ""


def ca_bundle(text: str) -> str:
    """Check a file of authorities for TLS."""
    if text:
        try:
            tls_context(text)
        except OSError as error:
            raise ValueError(f"{text!r} can't be used: {error.strerror or error}") from None
    return text


def positive(value: Any) -> Any:
    """Check a number that must not be 0."""
    if value is not None and not value > 0:
        raise ValueError("it must be more than 0")
    return value


def one_process(value: int) -> int:
    """Check the number of processes: a supervisor starts more of them, not this file."""
    if value != 1:
        raise ValueError(
            "must be 1: run several processes behind one address as the README's section "
            '"Several processes" shows'
        )
    return value


def one_of(*values: str) -> Callable[[str], str]:
    """A check that a text is one of some words."""

    def check(text: str) -> str:
        if text.lower() not in values:
            raise ValueError(f"{text!r} is none of {', '.join(values)}")
        return text.lower()

    return check


def proxy_url(text: str) -> str:
    """Check "http://[user:password@]host:port"; "" is none."""
    parts = urllib.parse.urlsplit(text)
    if text and (
        parts.scheme != "http"
        or not parts.hostname
        or parts.path.strip("/")
        or not re.fullmatch("[!-~]+", text)
        or parts.port == 0
    ):  # .port itself raises ValueError for what is no port
        raise ValueError("it must be http://[USER:PASSWORD@]HOST:PORT")
    return text


def controller_name(text: str) -> str:
    """Check a name that can stand in a header field."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", text):
        raise ValueError("only letters, digits, '.', '_' and '-' are allowed")
    return text


def key_name(text: str) -> str:
    """Check the name of a key, which must be there."""
    if not text:
        raise ValueError("it must not be empty")
    return controller_name(text)


def header_fields(fields: Dict[str, str]) -> Dict[str, str]:
    """Check header fields; those that make the framing are not ours to set."""
    for name, value in fields.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ValueError(f"{name!r} is no name of a header field")
        if name.lower() in ("content-length", "transfer-encoding", "connection", "host"):
            raise ValueError(f"{name!r} can't be set")
        header_value(value)
    return fields


class ValidatedSettings:
    """A dataclass whose fields' checks run when it is made: ConfigError lists what they find."""

    def __post_init__(self) -> None:
        problems = []
        for item in setting_fields(type(self)):
            try:
                value = getattr(self, item.name)
                if item.type.startswith("Tuple") and isinstance(value, str):
                    value = from_text(item, value)
                object.__setattr__(self, item.name, validate(item, value))
            except ValueError as error:
                problems.append(f"{item.name}: {error}")
        if problems:
            raise ConfigError(problems)

    def redacted_items(self) -> List[Tuple[str, str]]:
        """(name, value) of each setting, secrets blacked out."""
        return [
            (item.name, "********" if item.metadata["secret"] and value else format_value(value))
            for item in setting_fields(type(self))
            for value in [getattr(self, item.name)]
        ]


@dataclass(frozen=True)
class ControllerSettings(ValidatedSettings):
    """One upstream of the pool: an object in the configuration's ``controllers``."""

    type: str = setting("openai", "openai, akash or echo")
    name: str = setting(
        "", "its name in logs, /status and X-Akashproxy-Route; none: its type", controller_name
    )
    weight: float = setting(1.0, "its share of the requests, beside the others' weights; 0: off")
    priority: int = setting(1, "its tier: 2 is used when all of tier 1 rest")
    base_url: str = setting(
        "",
        "the upstream's address; none: https://api.openai.com/v1, or AKASH_BASE_URL",
        optional_url,
    )
    api_key: str = setting(
        "",
        "its key; none: OPENAI_API_KEY at OpenAI's own host, AKASH_ACCESS_TOKEN at AKASH_BASE_URL's",
        header_value,
        secret=True,
    )
    proxy: str = setting(
        "",
        "an http proxy on the way to it, http://[USER:PASSWORD@]HOST:PORT",
        proxy_url,
        secret=True,
    )
    headers: Dict[str, str] = setting(
        {}, "further header fields for it", header_fields, secret=True
    )
    models: Tuple[str, ...] = setting(
        (), "names or patterns of the models it is asked for; none: what its /v1/models lists"
    )
    model_map: Dict[str, str] = setting({}, "our name of a model to its name")
    drop: Tuple[str, ...] = setting((), "fields of a request that it can't take")
    paths: Tuple[str, ...] = setting(
        (),
        "patterns of the paths that are relayed to it as they are; none: all but "
        "/v1/messages and /v1/responses",
    )
    max_concurrency: int = setting(0, "requests at a time; 0: any number")
    speed: float = setting(50.0, "words per second of an echo controller; 0: at once")
    connect_timeout: Optional[float] = setting(
        None, "as the setting of this name, for this one", positive
    )
    first_byte_timeout: Optional[float] = setting(
        None, "as the setting of this name, for this one", positive
    )
    idle_timeout: Optional[float] = setting(
        None, "as the setting of this name, for this one", positive
    )
    key_source: str = field(default="", compare=False)  # where api_key comes from, for --check


@dataclass(frozen=True)
class ClientKeySettings(ValidatedSettings):
    """Somebody who may use the server: an object in the configuration's ``keys``."""

    name: str = setting("", "whose it is, in the log, /status and /metrics", key_name)
    key: str = setting("", "what the client sends as its token", nonempty_header_value, secret=True)
    models: Tuple[str, ...] = setting((), "names or patterns of the models it is for; none: all")
    requests_per_minute: int = setting(0, "calls of models in a minute; 0: any number")
    max_concurrency: int = setting(0, "calls of models at a time; 0: any number")
    refuse_fields: Tuple[str, ...] = setting(
        (), "fields of a request's body that this key must not send"
    )


@dataclass(frozen=True)
class Settings(ValidatedSettings):
    """All that can be set. A field's environment variable is its name in capitals, its flag its name with dashes,
    its key in the configuration file its name."""

    server_address: str = setting(
        "localhost:16571", "where to listen: HOST:PORT, :PORT or [V6]:PORT", address
    )
    config_file: str = setting(
        "",
        "a file with settings and controllers; none: it is searched for",
        also="CHATGPT_APISERVER_CONFIG_FILE",
    )
    config_path: str = setting(
        "",
        "the directory to search, instead of the usual ones",
        also="CHATGPT_APISERVER_CONFIG_PATH",
    )
    pool_type: str = setting(
        "balanced",
        "how a controller is chosen: balanced, random or least_busy",
        one_of("balanced", "random", "least_busy"),
        also="CHATGPT_APISERVER_POOL_TYPE",
    )
    max_wait: float = setting(
        3.0, "seconds for which a request waits when all controllers rest or are busy"
    )
    model_aliases: Dict[str, str] = setting(
        {},
        "NAME=VALUE,NAME=VALUE: other names of models, or patterns of such, and "
        "the model that is meant",
    )
    akash_base_url: str = setting("https://chat.akash.network", "the Akash Chat server", base_url)
    bearer_token: Tuple[str, ...] = setting(
        (),
        "tokens that clients must send, separated by commas; none: open to all",
        nonempty_header_value,
        secret=True,
    )
    akash_access_token: str = setting(
        "", "access token of a protected Akash Chat server", header_value, secret=True
    )
    akash_cookie: str = setting(
        "",
        "a cookie to send to Akash Chat beside the session, NAME=VALUE",
        header_value,
        secret=True,
    )
    user_agent: str = setting(
        f"akashproxy/{__version__}", "User-Agent for the upstream", header_value
    )
    ca_file: str = setting("", "a file with further authorities for TLS to upstreams", ca_bundle)
    public_url: str = setting(
        "",
        "address under which clients see this server; none: as their Host header says",
        optional_url,
    )
    page: str = setting("on", "on or off: the page to chat with, at /", one_of("on", "off"))
    metrics: str = setting(
        "on",
        "on, public (no token is needed) or off: figures for Prometheus, at /metrics",
        one_of("on", "public", "off"),
    )
    cors_origins: Tuple[str, ...] = setting(
        (),
        "origins whose pages may use this server, separated by commas, * for all; "
        "none: all if a token is needed, else local ones",
        nonempty_header_value,
    )
    connect_timeout: float = setting(10.0, "seconds for a connection to the upstream", positive)
    session_timeout: float = setting(
        15.0, "seconds for the upstream's session, models and picture states", positive
    )
    first_byte_timeout: float = setting(
        300.0, "seconds until the answer's first text, reasoning or tool call", positive
    )
    idle_timeout: float = setting(120.0, "seconds of silence within an answer", positive)
    image_timeout: float = setting(300.0, "seconds for a picture", positive)
    image_poll: float = setting(
        0.5, "seconds until a picture is first asked for; later ones take longer", positive
    )
    models_ttl: float = setting(600.0, "seconds for which a list of models is kept")
    head_timeout: float = setting(10.0, "seconds for a client to send a request's head", positive)
    body_timeout: float = setting(60.0, "seconds for a client to send a request's body", positive)
    write_timeout: float = setting(
        60.0, "seconds for a client to take in what it was sent", positive
    )
    keepalive_timeout: float = setting(
        75.0, "seconds for which an idle client connection is kept", positive
    )
    max_body: int = setting(32 << 20, "bytes in the largest request")
    max_body_total: int = setting(
        256 << 20, "bytes of all request bodies that are being received; above it a 503", positive
    )
    max_connections: int = setting(10000, "clients that are connected at a time; more get a 503")
    heartbeat: float = setting(
        15.0, "seconds of silence in a stream after which a ping is sent", positive
    )
    pings: str = setting(
        "comment",
        "what a ping is: comment, chunk (an empty one) or off",
        one_of("comment", "chunk", "off"),
    )
    workers: int = setting(
        1,
        "1: run more processes behind nginx, see the README's section Several processes",
        one_process,
    )
    grace: float = setting(7.0, "seconds for running requests to end after SIGTERM")
    log_format: str = setting("text", "text or json", one_of("text", "json"))
    log_level: str = setting(
        "info", "debug, info, warning or error", one_of("debug", "info", "warning", "error")
    )
    controllers: Tuple[ControllerSettings, ...] = ()  # only in a file; none: one Akash Chat server
    keys: Tuple[ClientKeySettings, ...] = ()  # only in a file; beside bearer_token

    @classmethod
    def load(cls, environ: Dict[str, str], flags: Optional[Dict[str, str]] = None) -> "Settings":
        """From the configuration file, over it the environment, over that flags {field name: text}.

        ConfigError lists all mistakes, each with its place.
        """
        problems: List[str] = []
        overrides: Dict[str, Any] = {}
        for item in setting_fields(cls):
            flag = (flags or {}).get(item.name)
            name = next(filter(environ.get, (item.name.upper(), item.metadata["also"])), "")
            source = name if flag is None else flag_name(item)
            if source:
                with collecting_errors(problems, source):
                    overrides[item.name] = validate(
                        item, from_text(item, environ[name] if flag is None else flag)
                    )
        if environ.get("CHATGPT_APISERVER_PORT") and "server_address" not in overrides:
            with collecting_errors(problems, "CHATGPT_APISERVER_PORT"):
                overrides["server_address"] = address(":" + environ["CHATGPT_APISERVER_PORT"])
        path = overrides["config_file"] = find_config(
            overrides.get("config_file", ""), overrides.get("config_path", ""), problems
        )
        values = ConfigFile(path, environ, problems).settings() if path else {}
        if environ.get("DEFAULT_SERVER_ADDRESS") and "server_address" not in values:
            with collecting_errors(problems, "DEFAULT_SERVER_ADDRESS"):
                values["server_address"] = address(environ["DEFAULT_SERVER_ADDRESS"])
        if problems:
            raise ConfigError(problems)
        return cls(**{**values, **overrides})

    def pool(self) -> List[ControllerSettings]:
        """The controllers, their gaps filled: one Akash Chat server if none are configured."""
        defaults = {"akash": {"base_url": self.akash_base_url}, "openai": {"base_url": OPENAI_URL}}
        completed, names = [], set()
        for options in self.controllers or [ControllerSettings(type="akash")]:
            missing = {
                name: value
                for name, value in defaults.get(options.type, {}).items()
                if not getattr(options, name)
            }
            name, number = options.name or options.type, 1
            while name in names:
                number += 1
                name = f"{options.name or options.type}-{number}"
            names.add(name)
            if (
                options.type == "akash"
                and self.akash_access_token
                and not options.api_key
                and self.is_akash_server(options.base_url)
            ):
                missing.update(api_key=self.akash_access_token, key_source="AKASH_ACCESS_TOKEN")
            completed.append(dataclasses.replace(options, name=name, **missing))
        return completed

    def needs_token(self) -> bool:
        """Whether clients must send a token."""
        return bool(self.bearer_token or self.keys)

    def host_names(self) -> List[str]:
        """The names that these settings give the server, in lower case."""
        names = [
            split_address(self.server_address)[0],
            urllib.parse.urlsplit(self.public_url).hostname,
        ]
        return [name.lower() for name in names if name]

    def is_akash_server(self, url: str) -> bool:
        """Whether AKASH_ACCESS_TOKEN and AKASH_COOKIE may be sent to an address: none, or one of AKASH_BASE_URL's server."""
        return not url or url_origin(url) == url_origin(self.akash_base_url)


OPENAI_URL = "https://api.openai.com/v1"


def is_openai_server(url: str) -> bool:
    """Whether OPENAI_API_KEY may be sent to an address: none, or one of OpenAI's own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return not url or host == "api.openai.com" or host.endswith(".api.openai.com")


def url_origin(url: str) -> Tuple[str, Optional[str], int]:
    """Scheme, host and port of an http(s) address."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


CONFIG_DIRECTORIES = [".", ".config", "config", "/etc/akashproxy", "/etc/chatgpt-apiserver"]
FILE_NAMES = ["akashproxy.json", "chatgpt-apiserver.json"]
OTHER_FORMATS = [
    "yaml",
    "yml",
    "toml",
    "ini",
    "hcl",
    "properties",
]  # that chatgpt-apiserver could read
NOT_JSON = "only JSON can be read; please convert it"


def find_config(file: str, directory: str, problems: List[str]) -> str:
    """The configuration file to use: the one named, else the first that is found; "" if there is none.

    It is a mistake if a directory was named that has none, or if there are only files in another format.
    """
    if file:
        return file
    folders = [directory] if directory else CONFIG_DIRECTORIES
    paths = [os.path.join(folder, name) for folder in folders for name in FILE_NAMES]
    found = next(filter(os.path.isfile, paths), "")
    others = [
        path
        for path in (
            f"{path[: -len('json')]}{ending}" for path in paths for ending in OTHER_FORMATS
        )
        if not found and os.path.isfile(path)
    ]
    if others:
        problems.append(f"the configuration: {others[0]}: {NOT_JSON}")
    elif directory and not found:
        problems.append(f"the configuration: there is no {' or '.join(FILE_NAMES)} in {directory}")
    return found


class ConfigFile:
    """A configuration file: akashproxy's own, or one of chatgpt-apiserver. Mistakes go to ``problems``, all of them."""

    VARIABLE = r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}"

    def __init__(self, path: str, environ: Dict[str, str], problems: List[str]) -> None:
        self.path, self.environ, self.problems = path, environ, problems

    def settings(self) -> Dict[str, Any]:
        """The values of Settings that it has."""
        data = self.read(self.path)
        if data is None:
            return {}
        present = set(data)
        port, pool, controllers, keys = (
            data.pop(name, None) for name in ("port", "pool", "controllers", "keys")
        )
        known = {item.name: item for item in setting_fields(Settings)}
        values = self.fields(known, data, "", ["port", "pool", "controllers", "keys"])
        if port is None and self.is_chatgpt_apiserver(controllers):
            port = 8080  # as chatgpt-apiserver has it
        if port is not None and "server_address" not in values:
            with self.collecting_errors("port"):
                values["server_address"] = address(f":{port}")
        if isinstance(pool, dict):
            for value in self.fields({"type": known["pool_type"]}, pool, "pool.").values():
                values["pool_type"] = value
        elif pool is not None:
            self.problem("pool", "it must be an object")
        if isinstance(controllers, list) and controllers:
            values["controllers"] = self.build_list("controllers", controllers, self.controller)
            if values["controllers"] and not any(
                options.weight for options in values["controllers"]
            ):
                self.problem("controllers", "all of them are off (weight 0)")
        elif "controllers" in present:
            self.problem("controllers", "it must be a list with at least one controller")
        if isinstance(keys, list):
            values["keys"] = self.build_list("keys", keys, self.key)
            if len({options.key for options in values["keys"]}) < len(values["keys"]):
                self.problem("keys", "two have the same key")
        elif "keys" in present:
            self.problem("keys", "it must be a list")
        return values

    def is_chatgpt_apiserver(self, controllers: Any) -> bool:
        """Whether the file is one of chatgpt-apiserver: by its name, or by ``config`` in a controller."""
        return os.path.basename(self.path) == FILE_NAMES[1] or any(
            name in as_dict(item)
            for item in as_list(controllers)
            for name in ("config", "config_file")
        )

    def build_list(
        self, key_path: str, items: List[Any], make: Callable[[Dict[str, Any], str], Any]
    ) -> Tuple[Any, ...]:
        """What ``make(object, its place)`` makes of the objects in a list; their names must differ."""
        built = []
        for at, item in enumerate(items):
            if isinstance(item, dict):
                built.append(make(item, f"{key_path}[{at}]"))
            else:
                self.problem(f"{key_path}[{at}]", "it must be an object")
        names = [options.name for options in filter(None, built) if options.name]
        for name in {name for name in names if names.count(name) > 1}:
            self.problem(key_path, f"two are called {name!r}")
        return tuple(filter(None, built))

    def key(self, data: Dict[str, Any], key_path: str) -> Optional[ClientKeySettings]:
        before = len(self.problems)
        values = self.fields(
            {item.name: item for item in setting_fields(ClientKeySettings)}, data, key_path + "."
        )
        for name in ("name", "key"):
            if name not in data:
                self.problem(f"{key_path}.{name}", "it is missing")
        return ClientKeySettings(**values) if len(self.problems) == before else None

    def controller(self, data: Dict[str, Any], key_path: str) -> Optional[ControllerSettings]:
        more, file, within = (
            data.pop("config", None) or {},
            data.pop("config_file", None),
            ".config.",
        )
        if (
            isinstance(file, str) and file
        ):  # beside this file, or where the command was started, as it was there
            beside = os.path.join(os.path.dirname(self.path), file)
            within = f".config_file ({file})."
            more = self.read(
                beside if os.path.exists(beside) or not os.path.exists(file) else file,
                key_path + ".config_file",
            )
        elif file not in (None, ""):
            self.problem(key_path + ".config_file", "it must be the name of a file")
        if not isinstance(more, dict):
            if more is not None:
                self.problem(key_path + ".config", "it must be an object")
            return None
        before, known = (
            len(self.problems),
            {item.name: item for item in setting_fields(ControllerSettings)},
        )
        values = {
            **self.fields(known, more, key_path + within),
            **self.fields(known, data, key_path + ".", ["config", "config_file"]),
        }
        if values.get("type", "openai") not in CONTROLLERS:
            self.problem(
                key_path + ".type",
                f"{values['type']!r} is none of {', '.join(sorted(CONTROLLERS))}",
            )
        if len(self.problems) > before:
            return None
        source = (
            (self.path if data.get("api_key") or not file else file)
            if values.get("api_key")
            else ""
        )
        if (
            values.get("type", "openai") == "openai"
            and not source
            and is_openai_server(values.get("base_url", ""))
        ):
            source = "OPENAI_API_KEY"
            with collecting_errors(self.problems, source):
                values["api_key"] = header_value(self.environ.get(source, ""))
            if not self.environ.get(source):
                self.problem(key_path + ".api_key", "it is missing, and OPENAI_API_KEY is not set")
        return (
            ControllerSettings(**values, key_source=source)
            if len(self.problems) == before
            else None
        )

    def read(self, path: str, key_path: str = "") -> Optional[Dict[str, Any]]:
        """The JSON object in a file, its ${NAME}s filled in; None if there is none."""
        try:
            with open(path, "rb") as file:
                data = from_json(file.read())
        except OSError as error:
            what = error.strerror
        except json.JSONDecodeError as error:
            what = f"line {error.lineno}, column {error.colno}: {error.msg}"
            if path.rpartition(".")[2].lower() in OTHER_FORMATS:
                what = NOT_JSON
        except ValueError as error:
            what = str(error)
        else:
            if isinstance(data, dict):
                with contextlib.suppress(RecursionError):
                    return self.expand_env(data, key_path)
            what = "it must be a JSON object"
        self.problems.append(
            f"{self.path}: {key_path}: {path}: {what}"
            if key_path
            else f"the configuration: {path}: {what}"
        )
        return None

    def expand_env(self, value: Any, key_path: str) -> Any:
        """The value with the environment's values in place of each ${NAME}."""
        if isinstance(value, dict):
            return {
                name: self.expand_env(item, f"{key_path}.{name}".lstrip("."))
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.expand_env(item, f"{key_path}[{at}]") for at, item in enumerate(value)]
        if not isinstance(value, str):
            return value

        def replace(match: Any) -> str:
            if not self.environ.get(match[1]):
                self.problem(key_path, f"the environment variable {match[1]} is not set")
            return self.environ.get(match[1]) or match[0]

        if "${" in re.sub(self.VARIABLE, "", value):
            self.problem(key_path, "after ${ the name of an environment variable and } must follow")
        return re.sub(self.VARIABLE, replace, value)

    def fields(
        self, known: Dict[str, Any], data: Dict[str, Any], key_path: str, others: Iterable[str] = ()
    ) -> Dict[str, Any]:
        """The values of the settings that are known; what else there is, is a mistake."""
        values = {}
        for name, value in data.items():
            if name in known:
                with self.collecting_errors(key_path + name):
                    values[name] = validate(known[name], from_json_value(known[name], value))
            else:
                import difflib

                near = difflib.get_close_matches(name, [*known, *others], 1)
                self.problem(
                    key_path + name,
                    "unknown key" + (f"; did you mean {near[0]!r}?" if near else ""),
                )
        return values

    def problem(self, key_path: str, what: str) -> None:
        self.problems.append(f"{self.path}: {key_path}: {what}")

    def collecting_errors(self, key_path: str) -> Any:
        return collecting_errors(self.problems, f"{self.path}: {key_path}")


@contextlib.contextmanager
def collecting_errors(problems: List[str], key_path: str) -> Iterator[None]:
    """Make a problem of a ValueError."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{key_path}: {error}")


def setting_fields(cls: Any) -> List[Any]:
    """The fields of a class that are settings."""
    return [item for item in dataclasses.fields(cls) if item.metadata]


def flag_name(item: Any) -> str:
    """The flag of a setting."""
    return "--" + item.name.replace("_", "-")


def from_text(item: Any, text: str) -> Any:
    """The value of a setting from a flag or the environment; ValueError says what is wrong with it."""
    if item.type == "int":
        if not re.fullmatch("[0-9]+", text):
            raise ValueError(f"{text!r} is no whole number")
        return int(text)
    if item.type == "float":
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
            raise ValueError(f"{text!r} is no number of seconds")
        return float(text)
    if item.type == "str":
        return text
    parts = [part.strip() for part in text.split(",")] if text else []
    if not item.type.startswith("Dict"):
        return tuple(parts)
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in parts]
    if not all(name and value for name, value in pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,NAME=VALUE")
    return dict(pairs)


def format_value(value: Any) -> str:
    """A setting's value as from_text() reads it."""
    if isinstance(value, dict):
        value = [f"{name}={other}" for name, other in value.items()]
    return (
        ",".join(value) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
    )


def from_json_value(item: Any, value: Any) -> Any:
    """The value of a setting from JSON; ValueError says what it must be."""
    if item.type == "str" and isinstance(value, str):
        return value
    if item.type == "int" and type(value) is int and value >= 0:
        return value
    if (
        item.type.endswith(("float", "float]"))
        and type(value) in (int, float)
        and 0 <= value < 1e15
    ):
        return float(value)
    if item.type.startswith("Tuple"):
        value = value.split(",") if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(part.strip() for part in value)
    if (
        item.type.startswith("Dict")
        and isinstance(value, dict)
        and all(isinstance(part, str) for part in value.values())
    ):
        return value
    kinds = {
        "Tuple": "a list of texts",
        "Dict": "an object with texts",
        "float": "a number, not negative",
        "int": "a whole number, not negative",
        "str": "a text",
    }
    raise ValueError(
        "it must be " + next(what for kind, what in kinds.items() if kind in item.type)
    )


def validate(item: Any, value: Any) -> Any:
    """The value to use; ValueError says what is wrong with it."""
    check = item.metadata["check"]
    return tuple(map(check, value)) if isinstance(value, tuple) else check(value)


# == 5. http ==================================================================================
# A strict HTTP/1.1 codec for both sides (RFC 9112): heads and bodies, no more. It refuses whatever
# two readers of one message could read differently. Knows neither models nor JSON.

MAX_HEAD_BYTES = 65536
MAX_HEADERS = 100
MAX_INTERIM_RESPONSES = 100  # 1xx answers before the final one
RECV_SIZE = 65536
MAX_BUFFERED_BODY = 64 << 20  # bytes of an upstream's answer that is kept whole

_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_BARE_BREAK = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])"
)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
_BLANK_LINES = re.compile(rb"(?:\r\n)*")
_HOST = re.compile(r"[A-Za-z0-9.:_\[\]~%!$&'()*+;=-]*")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;[\t -~\x80-\xff]*)?")
_HEX = re.compile(rb"[0-9A-Fa-f]{1,15}")
_TOKEN_BYTES = frozenset(
    b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


def find_head_end(buffer: bytes, scan_from: int = 0, first: Iterable[int] = _TOKEN_BYTES) -> int:
    """Where the blank line after a head begins; -1 if it has not come. What is hopeless is refused at once."""
    end = buffer.find(b"\r\n\r\n", scan_from)
    if end > MAX_HEAD_BYTES or end < 0 and len(buffer) > MAX_HEAD_BYTES:
        raise ProtocolError("the head is too large", 431)
    if (
        end < 0
        and buffer
        and buffer != b"\r"
        and (
            buffer[0] not in first
            or _BARE_BREAK.search(buffer, scan_from)
            or buffer.find(b"\r\n", scan_from) >= 0
            and b"HTTP/" not in buffer
        )
    ):
        raise ProtocolError("this is not HTTP/1.1")
    return end


# One head is much like the other: what lines were taken apart to is remembered, unless they are long.
cached = functools.lru_cache(maxsize=1024)
LONG_PATH = 8192  # a longer one is none of ours however it is decoded, which would cost the more
CACHE_MAX_LINE = 2048


class Headers(Dict[str, str]):
    """The fields of a message by lower-case name; lookups by any case, as with the library's headers."""

    def __missing__(self, name: str) -> str:
        lower = name.lower()
        if lower == name:
            raise KeyError(name)
        return self[lower]

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())


def parse_head(head: bytes, parse_line: Any) -> Tuple[Any, Dict[str, str]]:
    """What a head's first line says, and its fields; those of one name joined by ", ", set-cookie by a line feed."""
    line, *lines = head.decode("latin-1").split("\r\n")
    if len(lines) > MAX_HEADERS:
        raise ProtocolError("there are too many header fields", 431)
    if len(head) <= CACHE_MAX_LINE:
        start_line, pairs = parse_line(line), list(map(parse_field, lines))
    else:
        start_line, pairs = parse_line.__wrapped__(line), list(map(parse_field.__wrapped__, lines))
    headers = dict(pairs)
    if len(headers) < len(pairs):
        headers = {
            each: ("\n" if each == "set-cookie" else ", ").join(
                value for name, value in pairs if name == each
            )
            for each in headers
        }
    return start_line, headers


@cached
def parse_field(line: str) -> Tuple[str, str]:
    """A header field's name, in lower case, and its value."""
    match = _FIELD.fullmatch(line)
    if not match:
        raise ProtocolError("a header field is malformed")
    return match[1].lower(), match[2].strip(" \t")


@cached
def parse_request_line(line: str) -> Tuple[str, str, str, str]:
    """Method, path (decoded once), query and minor version of a request line (RFC 9112, 3)."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("the request line is malformed")
    method, target, major, http_minor = match.groups()
    if major != "1":
        raise ProtocolError("this is not HTTP/1.1", 505)
    absolute = None if target.startswith("/") else re.match(r"https?://([^/?#]*)", target, re.I)
    if absolute:
        target = target[absolute.end() :] or "/"
    elif not target.startswith("/") and (target, method) != ("*", "OPTIONS"):
        raise ProtocolError("the request's target is malformed")
    path, _, query = target.partition("?")
    path = path if len(path) > LONG_PATH else urllib.parse.unquote(path, errors="replace")
    return method, path, query, "0" if http_minor == "0" else "1"


@cached
def parse_status_line(line: str) -> Tuple[str, int]:
    """Minor version and status of a status line (RFC 9112, 4)."""
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("this is not HTTP/1.1")
    return match[1], int(match[2])


class ChunkSizes(dict):
    """The size of a chunk by its line, -1 if that has more in it. The first thousands of them are remembered."""

    def __missing__(self, line: bytes) -> int:
        size = int(line, 16) if _HEX.fullmatch(line) else -1
        if len(self) < 4096 and len(line) < 16:
            self[line] = size
        return size


CHUNK_SIZES = ChunkSizes()


class BodyDecoder:
    """The body of a message, taken out of its framing as the bytes arrive (RFC 9112, section 6).

    feed() gives the payload within the data; ``done`` tells that the end was reached, ``trailing_data`` what
    came after it; close() says that the connection has ended. ProtocolError for what smuggling is made of.
    """

    def __init__(self, fields: Dict[str, str], until_close: bool = False) -> None:
        self.done, self.trailing_data = False, b""
        self.remaining = 0  # payload still to come, of the body or of the chunk
        self.chunked = self.until_close = False
        self.state, self.buffer = (
            "size",
            b"",
        )  # of the chunked framing: what comes next, and the part of a line that is here
        coding, length = fields.get("transfer-encoding"), fields.get("content-length")
        if coding is not None:
            if length is not None:
                raise ProtocolError("both Content-Length and Transfer-Encoding")
            if coding.lower() != "chunked":
                raise ProtocolError(f"Transfer-Encoding {coding[:40]!r} is not supported", 501)
            self.chunked = True
        elif length is not None:
            if not _LENGTH.fullmatch(length):
                raise ProtocolError("Content-Length is no number")
            self.remaining = int(length)
            self.done = not self.remaining
        else:
            self.until_close, self.done = until_close, not until_close

    def feed(self, data: bytes) -> bytes:
        if self.chunked:
            return self._chunked(data)
        if self.until_close:
            return data
        if len(data) > self.remaining:
            data, self.trailing_data = data[: self.remaining], data[self.remaining :]
        self.remaining -= len(data)
        self.done = not self.remaining
        return data

    def close(self) -> None:
        if self.until_close:
            self.done = True
        elif not self.done:
            raise ProtocolError("the connection ended within a body")

    def _chunked(self, data: bytes) -> bytes:
        """size [;extension] CR LF data CR LF ... 0 CR LF trailers CR LF"""
        chunk = self.single_chunk(data)
        if chunk:
            return chunk
        scan_from = len(self.buffer)
        if scan_from:
            data, self.buffer = self.buffer + data, b""
        parts, at, untried = [], 0, True
        while not self.done:
            if self.remaining:
                part = data[at : at + self.remaining]
                parts.append(part)
                at += len(part)
                self.remaining -= len(part)
                if self.remaining:
                    break
                self.state = "end"
            elif untried and self.state == "size":
                untried = False
                chunks, data, at = self._split_simple_chunks(data[at:] if at else data)
                parts += chunks
                if self.done:
                    break
            end = data.find(b"\r\n", at)
            if end < 0:
                self._save_partial(data[at:], max(0, scan_from - 1 - at))
                break
            self._handle_framing_line(data[at:end])
            at = end + 2
        if self.done:
            self.trailing_data = data[at:]
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def single_chunk(self, data: bytes) -> bytes:
        """The payload, if the data is one whole chunk, as where tokens come one by one; else b""."""
        if (
            not self.remaining
            and not self.buffer
            and self.state == "size"
            and data.endswith(b"\r\n")
        ):
            size, _, chunk = data.partition(b"\r\n")
            if len(chunk) - 2 == CHUNK_SIZES[size]:
                return chunk[:-2]
        return b""

    def _split_simple_chunks(self, data: bytes) -> Tuple[List[bytes], bytes, int]:
        """The usual, taken apart at once: whole chunks without extensions, and without a line break within.

        They, the data, and where in it they end.
        """
        parts = data.split(b"\r\n")
        chunks = parts[1:-1:2]
        sizes = parts[: 2 * len(chunks) : 2]
        if (
            not chunks
            or b"" in chunks[:-1]
            or list(map(len, chunks)) != list(map(CHUNK_SIZES.__getitem__, sizes))
        ):
            return [], data, 0
        self.done = not chunks[-1]
        rest = parts[2 * len(chunks) :]
        return chunks, data, len(data) - sum(map(len, rest)) - 2 * (len(rest) - 1)

    def _save_partial(self, data: bytes, scan_from: int) -> None:
        if (
            len(data) > 4096
            or _BARE_BREAK.search(data, scan_from)
            or (self.state == "end" and data not in (b"", b"\r"))
        ):
            raise ProtocolError("the chunked coding is broken")
        self.buffer = data

    def _handle_framing_line(self, line: bytes) -> None:
        if self.state == "size":
            match = _CHUNK_SIZE.fullmatch(line)
            if not match:
                raise ProtocolError("a chunk's size is malformed")
            self.remaining = int(match[1], 16)
            if not self.remaining:
                self.state = "trailer"
                self.trailers = 0
        elif self.state == "end":
            if line:
                raise ProtocolError("a chunk is longer than its size")
            self.state = "size"
        elif line:
            parse_field.__wrapped__(line.decode("latin-1"))
            self.trailers += 1
            if self.trailers > MAX_HEADERS:
                raise ProtocolError("there are too many trailers", 431)
        else:
            self.done = True


NO_BODY = BodyDecoder({})


# == 6. transport =============================================================================
# The way to an upstream: urllib.request with connections that are kept. The network's exceptions
# end here: above this section an OSError can only mean that the client left. Knows no models.


class UpstreamRequest(urllib.request.Request):
    """A request to an upstream. Its URL is taken apart once: each exchange has a copy of its own."""

    def copy(
        self,
        method: str,
        data: Optional[bytes],
        fields: Dict[str, str],
        scope: CancelScope,
        force_new_connection: Any,
    ) -> "UpstreamRequest":
        request = UpstreamRequest.__new__(UpstreamRequest)
        request.__dict__.update(
            self.__dict__,
            unredirected_hdrs={},
            method=method,
            body=data,
            fields=fields,
            scope=scope,
            force_new_connection=force_new_connection,
        )
        return request

    def to_bytes(self) -> bytes:
        """The request as it goes on the wire."""
        fields = {"Host": self.host, **self.unredirected_hdrs, **self.fields}
        head = request_head(f"{self.method} {self.selector} HTTP/1.1", *fields.items())
        if self.body is None:
            return head + b"\r\n"
        return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(self.body), self.body)


@functools.lru_cache(maxsize=64)
def request_head(line: str, *fields: Tuple[str, str]) -> bytes:
    """A request's head but for its length and its end. Those of one upstream are much alike, so they are remembered."""
    lines = [line, *[f"{name}: {value}" for name, value in fields], ""]
    head = "\r\n".join(lines).encode("latin-1")
    if (
        head.count(b"\n") != len(fields) + 1
        or head.count(b"\r") != len(fields) + 1
        or b"\0" in head
    ):
        raise ProtocolError("a line break in a header field")
    return head


class ConnectionPool(urllib.request.BaseHandler):
    """urllib's handler of http and https, with the codec of section 5 and connections that are used again.

    It sends; who asked receives. Kept connections do not block, and one that has ended is noticed
    before it is used; where it ends in that very moment, the answer's failure is of the kind "again".
    """

    def __init__(self, ca_file: str = "") -> None:
        self.ca_file = ca_file
        self.idle: Dict[
            Any, List[Tuple[float, Any]]
        ] = {}  # (until when, socket), the youngest last
        self.closed = False
        self.lock = threading.Lock()

    def http_open(self, request: Any) -> "UpstreamResponse":
        """Send a request."""
        key = request.type, request.host, request._tunnel_host
        sock = None if request.force_new_connection else self._acquire(key)
        reused = sock is not None
        if sock is None:
            sock = self._connect(request)
        try:
            request.scope.attach(sock)
            try:
                self._send(sock, request.to_bytes())
            except OSError if reused else ConnectionError:
                log.debug(
                    "%s: it closed the connection while a request was sent", request.host
                )  # it may have answered before
            return UpstreamResponse(sock, request, reused, self, key)
        except BaseException:
            request.scope.detach()
            sock.close()
            raise

    https_open = http_open

    @staticmethod
    def _send(sock: Any, data: bytes) -> None:
        """Send all of a request; a kept connection does not block, and most often takes all of it at once."""
        try:
            sent = sock.send(data)
        except (BlockingIOError, WantWrite):
            sent = 0
        if sent < len(data):
            sock.setblocking(True)
            sock.sendall(data[sent:])

    def release(self, key: Any, sock: Any, seconds: float) -> None:
        """Keep a connection for the next request, for so long."""
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        with self.lock:
            if not self.closed:
                self.idle.setdefault(key, []).append((time.monotonic() + seconds, sock))
                return
        sock.close()

    def close_expired(self, now: float) -> None:
        """Close the connections that were kept until now."""
        with self.lock:
            old = [
                sock
                for connections in self.idle.values()
                for until, sock in connections
                if until < now
            ]
            for key, connections in list(self.idle.items()):
                self.idle[key] = [link for link in connections if link[0] >= now]
                if not self.idle[key]:
                    del self.idle[key]
        for sock in old:
            sock.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.close_expired(math.inf)

    def _acquire(self, key: Any) -> Any:
        """A kept connection that is still good, or None."""
        while True:
            with self.lock:
                connections = self.idle.get(key)
                if not connections:
                    return None
                until, sock = connections.pop()
            if until >= time.monotonic() and peek(sock) is None:
                return sock
            sock.close()

    def _connect(self, request: Any) -> Any:
        if request.type == "https":
            connection = http.client.HTTPSConnection(
                request.host, timeout=request.timeout, context=tls_context(self.ca_file)
            )
        else:
            connection = http.client.HTTPConnection(request.host, timeout=request.timeout)
        if request._tunnel_host:
            connection.set_tunnel(request._tunnel_host, headers=request.tunnel_headers)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection.sock


def is_persistent(http_minor: str, headers: Dict[str, str]) -> bool:
    """Does a message leave its connection open? ``http_minor`` is the digit after "HTTP/1."."""
    if "connection" not in headers:
        return http_minor == "1"
    options = [option.strip().lower() for option in headers.get("connection", "").split(",")]
    return "close" not in options if http_minor == "1" else "keep-alive" in options


def keepalive_seconds(headers: Dict[str, str]) -> float:
    """How long a kept connection may be used: a second less than its server said (conn-keepalive: 5 s, closed after 6)."""
    keep_alive = headers.get("keep-alive")
    match = re.search(r"timeout=([0-9]{1,4})", keep_alive) if keep_alive else None
    return max(0.0, float(match[1]) - 1) if match else 30.0


DONTWAIT = int(
    getattr(socket, "MSG_DONTWAIT", 0)
)  # do not wait, even if the socket is a blocking one
PEEK = socket.MSG_PEEK | DONTWAIT  # and leave what is there

try:
    from ssl import (
        SSLEOFError as RaggedEnd,
        SSLWantReadError as WantRead,
        SSLWantWriteError as WantWrite,
    )
except ImportError:  # a Python without ssl
    RaggedEnd = WantRead = WantWrite = BlockingIOError  # type: ignore[misc,assignment]


def peek(sock: Any) -> Optional[bytes]:
    """What a socket has to say, left there: None if nothing, b"" if the other side has closed or reset it."""
    try:
        if not DONTWAIT and not select.select([sock], [], [], 0)[0]:  # Windows
            return None
        return socket.socket.recv(sock, 1, PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def peer_has_closed(sock: Any) -> bool:
    """Has the other side closed, even if it has said something before that?"""
    peeked = peek(sock)
    if peeked and hasattr(socket, "TCP_INFO"):
        return (
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"
        )  # Linux: no more ESTABLISHED
    return peeked == b""


@functools.lru_cache(maxsize=None)
def tls_context(ca_file: str) -> Any:
    """The TLS context: host names checked, the system's authorities and those of a file. Made when first needed."""
    import ssl

    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    # A connection that ends without close_notify was cut; by default Python reports that as a proper end, and so
    # does OpenSSL 3 if Python asks it to (0x80: the option's value, for a Python that has no name for it).
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    context.wrap_socket = functools.partial(context.wrap_socket, suppress_ragged_eofs=False)  # type: ignore[method-assign]
    return context


class Proxy(urllib.request.BaseHandler):
    """Sends requests by way of an http proxy, the one that is configured and none of the environment's."""

    handler_order = 100  # before ConnectionPool makes the Host field

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2] + (":80" if parts.port is None else "")
        self.fields = {}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self.fields = {
                "Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()
            }

    def http_request(self, request: Any) -> Any:
        request.unredirected_hdrs["Host"] = request.host  # the upstream's, also within a tunnel
        request.set_proxy(self.host, "http")
        request.tunnel_headers = self.fields
        if not request._tunnel_host:
            request.unredirected_hdrs.update(self.fields)
        return request

    https_request = http_request


class UpstreamResponse:
    """An upstream's answer, for whoever has its bytes: the head first, then the payload of the body.

    ``status`` is 0 until the head has come; ``reused``: the connection was not new; ``timeouts`` is set by Transport.start_request.
    """

    timeouts: "Timeouts"

    def __init__(
        self, sock: Any, request: UpstreamRequest, reused: bool, pool: ConnectionPool, key: Any
    ) -> None:
        self.sock, self.scope, self.no_body = sock, request.scope, request.method == "HEAD"
        self.reused, self.pool, self.key = reused, pool, key
        self.status, self.headers, self.keep_alive = 0, {}, False
        self.body = NO_BODY
        self.head_buffer = bytearray()  # of a head that is not whole
        self.interim = 0  # interim answers so far
        self.first_payload = b""  # payload that came with the head
        self.first_byte_deadline = math.inf  # deadline of the answer's first content

    def receive(self, data: bytes) -> bytes:
        """The payload within some bytes of the socket (b"": it has ended); ProtocolError where that is too early."""
        if data and self.status:
            return self.body.feed(data)
        if data:
            data = self._head(data)
            return self.body.feed(data) if data else b""
        self.scope.raise_if_cancelled()
        if not self.status:
            raise ConnectionError("it closed the connection without an answer")
        self.body.close()
        return b""

    def _head(self, data: bytes) -> bytes:
        """Look for the end of the head; what is beyond it."""
        scan_from = max(0, len(self.head_buffer) - 3)
        self.head_buffer += data
        buffer: Any = self.head_buffer
        while not self.status:
            end = find_head_end(buffer, scan_from, b"H")
            if end < 0:
                self.head_buffer = buffer
                return b""
            (http_minor, status), self.headers = parse_head(buffer[:end], parse_status_line)
            buffer = buffer[end + 4 :]
            scan_from = 0
            self.status = status if status >= 200 else 0  # interim answers are skipped
            self.interim += not self.status
            if self.interim > MAX_INTERIM_RESPONSES:
                raise ProtocolError("there are too many interim answers")
        self.head_buffer = bytearray()
        no_body = self.no_body or status in (204, 304)
        self.body = BodyDecoder({} if no_body else self.headers, until_close=not no_body)
        self.keep_alive = is_persistent(http_minor, self.headers) and not self.body.until_close
        return bytes(buffer)

    def read_head(self) -> None:
        """Wait for the head."""
        try:
            self.sock.setblocking(True)
            while not self.status:
                self.first_payload = self.receive(self.sock.recv(RECV_SIZE))
        except (APIError, ClientDisconnected):
            self.close()
            raise
        except NETWORK_ERRORS as error:
            self.close()
            raise self.to_api_error(error) from error

    def to_api_error(self, error: Exception) -> APIError:
        """What a failure of the network means here; raises the reason why the watch was ended, if it was."""
        upstream_name = self.timeouts.upstream_name
        if self.reused and not self.status and not self.head_buffer and self.scope.reason is None:
            return APIError(
                502,
                f"{upstream_name} broke off the connection.",
                code="connection",
                category="again",
            )
        return upstream_error(error, self.scope, upstream_name)

    def reset_idle_deadline(self, started: bool = True) -> None:
        """Set the deadline of the next bytes: until an answer has started, that of its first content."""
        if started:
            self.scope.set_deadline(self.timeouts.idle, self.timeouts.idle_message)
        else:
            self.scope.deadline, self.scope.timeout_message = (
                self.first_byte_deadline,
                self.timeouts.first_byte_message,
            )

    def recv(self, started: bool = True) -> bytes:
        """The next bytes of the socket."""
        self.reset_idle_deadline(started)
        data = self.sock.recv(RECV_SIZE)
        self.scope.deadline = math.inf  # how long they are used is not the upstream's affair
        return data

    def iter_bytes(self) -> Iterator[bytes]:
        """The payload of each read; APIError where the upstream breaks off or falls silent."""
        self.scope.deadline = math.inf
        payload, self.first_payload = self.first_payload, b""
        while True:
            if payload:
                yield payload
            if self.body.done:
                break
            try:
                payload = self.receive(self.recv())
            except NETWORK_ERRORS as error:
                raise self.to_api_error(error) from error
        self.close()

    def read(self, limit: int = MAX_BUFFERED_BODY) -> bytes:
        """The whole body."""
        data = bytearray()
        try:
            for part in self.iter_bytes():
                data += part
                if len(data) > limit:
                    raise APIError(
                        502,
                        f"{self.timeouts.upstream_name} sent more than {limit} bytes.",
                        code="upstream_error",
                    )
        finally:
            self.close()
        return bytes(data)

    def json(self) -> Any:
        """The body as JSON; None if it is something else."""
        return json_or_none(self.read())

    def reusable(self) -> bool:
        """Can the connection take another request?"""
        return self.keep_alive and self.body.done and not self.body.trailing_data

    def close(self) -> None:
        """Keep the connection if the answer was read to its end, else close it, so that the upstream stops."""
        sock, self.sock = self.sock, None
        if sock is None:
            return
        self.scope.detach()
        if self.reusable():
            self.pool.release(self.key, sock, keepalive_seconds(self.headers))
        else:
            sock.close()


class Timeouts:
    """How long an upstream is waited for, in seconds, and what is said of it when that is over."""

    def __init__(self, upstream_name: str, first: float, idle: float) -> None:
        self.upstream_name, self.first, self.idle = upstream_name, first, idle
        self.first_byte_message = f"{upstream_name} did not answer within {first:g} seconds."
        self.idle_message = f"{upstream_name} sent nothing for {idle:g} seconds."


cached_timeouts = functools.lru_cache(maxsize=256)(Timeouts)


class Transport:
    """Requests to one upstream. ``upstream_name`` is what errors call it."""

    def __init__(
        self,
        options: ControllerSettings,
        settings: Settings,
        base: str,
        upstream_name: str,
        headers: Dict[str, str],
    ) -> None:
        self.base, self.upstream_name = base, upstream_name
        self.headers = {name.title(): value for name, value in headers.items()}
        self.connect_timeout, self.first_byte_timeout, self.idle_timeout = (
            getattr(settings if getattr(options, name) is None else options, name)
            for name in ("connect_timeout", "first_byte_timeout", "idle_timeout")
        )
        self.connections = ConnectionPool(settings.ca_file)
        self.opener = (
            urllib.request.OpenerDirector()
        )  # no redirects, no file: or ftp:, no proxies of the environment
        self.opener.addheaders = []
        self.opener.add_handler(self.connections)
        if options.proxy:
            self.opener.add_handler(Proxy(options.proxy))
        self.new_request = functools.lru_cache(maxsize=64)(
            lambda path: UpstreamRequest(base + path)
        )

    def start_request(
        self,
        method: str,
        path: str,
        scope: CancelScope,
        data: Optional[bytes] = None,
        headers: Optional[Dict[str, str]] = None,
        first_byte: Optional[float] = None,
        force_new_connection: Any = False,
    ) -> UpstreamResponse:
        """Send a request, whose answer is still to come. APIError 502 or 504 if that fails.

        ``force_new_connection``: on a new connection.
        """
        timeouts = cached_timeouts(
            self.upstream_name,
            first_byte or self.first_byte_timeout,
            first_byte or self.idle_timeout,
        )
        scope.set_deadline(timeouts.first, timeouts.first_byte_message)
        fields = {**self.headers, **headers} if headers else self.headers
        try:
            request = self.new_request(path).copy(method, data, fields, scope, force_new_connection)
            response = self.opener.open(request, timeout=self.connect_timeout)
        except NETWORK_ERRORS as error:
            raise upstream_error(error, scope, self.upstream_name) from error
        response.timeouts, response.first_byte_deadline = timeouts, scope.deadline
        return response

    def fetch(
        self,
        method: str,
        path: str,
        scope: CancelScope,
        data: Optional[bytes] = None,
        headers: Optional[Dict[str, str]] = None,
        first_byte: Optional[float] = None,
    ) -> UpstreamResponse:
        """Send a request and wait for the answer's head. APIError 502 or 504 if none comes."""
        for force_new_connection in (False, True):
            response = self.start_request(
                method,
                path,
                scope,
                data,
                headers,
                first_byte,
                force_new_connection=force_new_connection,
            )
            try:
                response.read_head()
                break
            except APIError as error:
                if error.category != "again":
                    raise
        return response


NETWORK_ERRORS = (OSError, ProtocolError, http.client.HTTPException)


# What the machine says when it has no descriptors, buffers or memory left for a socket.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_exhausted(error: Exception) -> bool:
    """Whether this machine, not the upstream, has caused a failure of the network."""
    if isinstance(
        error, socket.gaierror
    ):  # a resolver without a descriptor finds no host, and doesn't say why
        try:
            socket.socket().close()
        except OSError as cause:
            return cause.errno in EXHAUSTED
        return False
    return isinstance(error, OSError) and error.errno in EXHAUSTED


class Throttle:
    """True at most once in some seconds: for log lines that would repeat with each request. Any thread."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.next = seconds, clock, -math.inf

    def __call__(self) -> bool:
        now = self.clock()
        if now < self.next:
            return False
        self.next = now + self.seconds
        return True


report_exhaustion = Throttle(10.0)


def upstream_error(error: Exception, scope: CancelScope, upstream_name: str) -> APIError:
    """What a failure of the network means; raises the reason why the watch was ended, if it was."""
    scope.raise_if_cancelled()
    if is_exhausted(error):
        if report_exhaustion():
            log.error(
                "this server has no descriptors or memory left for connections to upstreams: %s",
                error,
            )
        return APIError(
            503,
            "This server is out of resources for more requests.",
            code="overloaded",
            retry_after=1,
            category="local",
        )
    if not isinstance(error, NETWORK_ERRORS):
        return unexpected_error(error, upstream_name)
    words = (
        str(error).partition(" '")[0] if isinstance(error, ProtocolError) else error
    )  # what it quotes is the upstream's
    log.info("%s: %s: %s", upstream_name, type(error).__name__, words)
    timed_out = isinstance(error, (socket.timeout, TimeoutError))
    if isinstance(error, (http.client.HTTPException, ProtocolError)):
        in_body = re.search("body|chunk|trailer", str(error))
        problem = (
            ": connection lost: it broke off its answer."
            if in_body
            else ": it sent something that is not HTTP."
        )
    elif timed_out:
        problem = " could not be reached in time."
    elif (
        isinstance(error, (ConnectionResetError, BrokenPipeError, RaggedEnd))
        or type(error) is ConnectionError
        or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"
    ):  # RaggedEnd in Python 3.9
        problem = ": connection lost: it broke off the connection."
    else:
        problem = " could not be reached."
    return APIError(
        504 if timed_out else 502,
        upstream_name + problem,
        code="upstream_error",
        category="network",
    )


def unexpected_error(error: Exception, upstream_name: str) -> APIError:
    """502 for an exception that a decoder or a controller raised; Upstream.log_exception logs it."""
    failure = APIError(
        502,
        f"{upstream_name} failed in an unexpected way.",
        code="upstream_error",
        category="network",
    )
    failure.bug = error
    return failure


class controller_errors:
    """Context manager: whatever a controller raises becomes an APIError of its own, so that the next one can be asked."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(
            error, (APIError, ClientDisconnected, Queued)
        ):
            raise unexpected_error(error, self.name) from error


# == 7. controllers ===========================================================================
# One class for each kind of upstream: Call -> wire, wire -> events. Knows neither clients nor dialects.


class DecoderChain:
    """A decoder and the filters behind it, as one: feed(data) and close() give events.

    ``error`` is what ends the answer, to be raised when the events before it have gone on their
    way; ``stopped`` tells that the answer was ended here, so that the upstream should stop.
    """

    def __init__(self, decoder: Any, *filters: Any) -> None:
        self.decoder, self.filters = decoder, filters
        self.error: Optional[APIError] = None

    complete = False  # that is told by Finish
    started = False  # text, reasoning, a tool call or the end has come
    stopped = property(lambda self: any(getattr(step, "stopped", False) for step in self.filters))

    def feed(self, data: bytes) -> List[Event]:
        events = self.decoder.feed(data)
        for step in self.filters:
            events = step.feed(events)
        self.started = self.started or bool(events)
        self.error = self.decoder.error
        return events + self.flush() if self.error else events

    @property
    def fast_path(self) -> Optional[Callable[[bytes], bytes]]:
        """The short way, for what can be understood without taking its JSON apart."""
        return self._fast_path if hasattr(self.decoder, "single_text") else None

    def _fast_path(self, data: bytes) -> bytes:
        """The JSON of its text, if the data is one piece of text that goes through as it is; else b""."""
        encoded = self.decoder.single_text(data)
        for step in self.filters:
            if not encoded or not step.is_passthrough(encoded[1:-1].decode()):
                return b""
        return encoded

    def close(self) -> List[Event]:
        """The connection has ended properly: what is left."""
        events = self.flush(self.decoder.close())
        self.error = self.decoder.error
        return events

    def flush(self, last: Iterable[Event] = ()) -> List[Event]:
        """The last events, and what the filters held back."""
        events = list(last)
        for step in self.filters:
            events = step.feed(events) + step.close()
        return events


class BufferedBody:
    """A body that is only understood whole: ``parse(data)`` gives its events, or raises the APIError that it means.

    With ``is_error_body`` that counts even if the body breaks off: a status says enough.
    """

    stopped = complete = False
    started = True  # the first byte is content

    def __init__(
        self,
        parse: Callable[[bytes], List[Event]],
        limit: int = MAX_BUFFERED_BODY,
        is_error_body: bool = False,
    ) -> None:
        self.parse, self.byte_budget, self.is_error_body = parse, limit, is_error_body
        self.data = (
            bytearray()
        )  # a list of its pieces would need many times their size where they are small
        self.error: Optional[APIError] = None

    def feed(self, data: bytes) -> List[Event]:
        self.byte_budget -= len(data)
        if self.byte_budget < 0:
            self.error = truncated("The upstream", "sent more than can be kept")
        self.data += data
        return []

    def close(self) -> List[Event]:
        try:
            return self.parse(bytes(self.data))
        except APIError as error:
            self.error = error
            return []

    def flush(self) -> List[Event]:
        if self.is_error_body and not self.error:
            self.close()
        return []


MAX_TOOL_CALLS = 10000  # calls of tools in an answer


def take_complete_lines(buffer: bytearray, data: bytes) -> bytes:
    """The whole lines of ``buffer`` and some more bytes; the beginning of a line is held. No byte is looked at twice."""
    end = data.rfind(b"\n") + 1
    if not end:
        buffer += data
        return b""
    lines = bytes(buffer) + data[:end] if buffer else data[:end]
    buffer[:] = data[end:]
    return lines


def too_many_calls(upstream_name: str) -> APIError:
    """Error for an answer with more calls of tools than MAX_TOOL_CALLS."""
    return truncated(upstream_name, f"sent more than {MAX_TOOL_CALLS} calls of tools")


class EventStream:
    """An answer that comes from a socket, for whoever has the bytes: the watchdog, or the thread that iterates it.

    ``make_decoder`` is called once the head is here: it gives the decoder of the body, or raises the
    APIError that the head means. receive() turns bytes into events. ``error`` is what ends the
    answer, once the events before it are used; ``at_eof`` tells that the socket has no more for it.
    """

    DRAIN_TIMEOUT = 1.0  # seconds for an upstream to end its message once the answer is whole

    def __init__(
        self, response: UpstreamResponse, make_decoder: Callable[[UpstreamResponse], Any]
    ) -> None:
        self.response, self.make_decoder = response, make_decoder
        self.decoder: Any = None
        self.started = False  # its first content has come: from now on the idle limit counts
        self.complete = self.at_eof = False
        self.error: Optional[Exception] = None
        self.byte_budget = math.inf  # bytes that it may still have

    def receive(self, data: bytes) -> List[Event]:
        """What some bytes of the socket mean; b"" is its end."""
        events: List[Event] = []
        response = self.response
        try:
            payload = (
                response.receive(data)
                if data or not response.body.done or not response.status
                else b""
            )
            if self.decoder is None:
                if not response.status:
                    return events
                self.decoder = self.make_decoder(response)
            self.byte_budget -= len(payload)
            if self.byte_budget < 0:
                raise truncated(response.timeouts.upstream_name, "sent more than can be kept")
            if payload and not self.complete:
                events = self.decoder.feed(payload)
                self.error = self.decoder.error
                if not self.started and self.decoder.started:
                    self.started, response.scope.timeout_message = (
                        True,
                        response.timeouts.idle_message,
                    )
                if self.decoder.complete or events and type(events[-1]) is Finish:
                    self.mark_complete()
            if response.body.done:
                self.at_eof = True
                if not self.complete and not self.error:
                    events += self.decoder.close()
                    self.error = self.decoder.error
                    self.complete = bool(events) and isinstance(events[-1], Finish)
        except Exception as error:  # whatever a decoder raises is this upstream's failure
            events += self.on_network_error(error)
        return events

    def mark_complete(self) -> None:
        """All of the answer is here. If we ended it the upstream should stop, else its message comes to a proper end."""
        self.started, self.complete, self.error, self.at_eof = (
            True,
            True,
            None,
            self.decoder.stopped,
        )
        self.response.timeouts = cached_timeouts(
            self.response.timeouts.upstream_name, self.DRAIN_TIMEOUT, self.DRAIN_TIMEOUT
        )

    def on_network_error(self, error: Exception) -> List[Event]:
        """The network or the decoder failed; if the answer was whole before, that is of no interest."""
        self.at_eof = True
        if self.complete:
            return []
        try:
            self.error = error if isinstance(error, APIError) else self.response.to_api_error(error)
        except (APIError, ClientDisconnected) as reason:  # why somebody ended it
            self.error = reason
        events: List[Event] = []
        try:
            events = self.decoder.flush() if self.decoder else []
        except Exception as another:  # a decoder with a bug may fail at this, too
            log.info(
                "%s: %s: %s", self.response.timeouts.upstream_name, type(another).__name__, another
            )
        if getattr(self.decoder, "is_error_body", False):
            self.error = self.decoder.error or self.error
        return events

    def __iter__(self) -> Iterator[Event]:
        """Its events, read by the thread that iterates."""
        with contextlib.closing(self):
            self.response.sock.setblocking(True)
            while not self.at_eof and not self.error:
                try:
                    events = self.receive(self.response.recv(self.started))
                except OSError as error:
                    events = self.on_network_error(error)
                yield from events
            if self.error:
                raise self.error

    def close(self) -> None:
        self.response.close()


class Controller:
    """An upstream. To be overridden: events(), and what else it can do."""

    transport: Any = None  # a Transport, where it has one

    def __init__(self, options: ControllerSettings, settings: Settings) -> None:
        self.options, self.settings, self.name = options, settings, options.name

    def events(self, call: Call) -> Iterable[Event]:
        """The answer: any iterable of events, or an EventStream. APIError if there is none.

        It runs in a worker thread and may block.
        """
        raise NotImplementedError

    def check_support(self, call: Call) -> Optional[APIError]:
        """Why it can't answer such a request at all; None if it can."""
        return None

    def models(self) -> List[Dict[str, Any]]:
        """What it offers, as OpenAI's model objects."""
        return []

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        """A picture's bytes."""
        raise APIError(404, f"{self.name} has no pictures.")

    def metrics(self) -> Dict[str, float]:
        """What it counts itself, {a name in METRICS: number}."""
        return {}

    def close_expired(self, now: float) -> None:
        """Close connections that have been idle for too long."""
        if self.transport:
            self.transport.connections.close_expired(now)

    def close(self) -> None:
        """Close all idle connections."""
        if self.transport:
            self.transport.connections.close()


# What an upstream's error means. The first row that fits decides: its status is one of ``statuses`` (none: any), and
# ``codes`` is found in its code, type and status name, or ``words`` in its message. Where a status says little and a message
# may quote the client, words are anchored: else a request could have a key declared dead by naming its model "invalid key".


class ErrorRule(NamedTuple):
    """A row of UPSTREAM_ERRORS: what such an error means for the pool and for the client."""

    statuses: Tuple[int, ...]
    codes: str
    words: str
    category: str  # of FAILURE_POLICY
    status: int = 0  # for the client; 0: the upstream's own
    reason: str = ""  # for "auth": what is wrong with what is ours

    def matches(self, status: int, codes: str, words: str) -> bool:
        return (not self.statuses or status in self.statuses) and bool(
            not self.codes
            and not self.words
            or self.codes
            and re.search(self.codes, codes)
            or self.words
            and re.search(self.words, words)
        )


_KEY = "the upstream refuses this server's key"
_QUOTA = "the quota of this server's key is spent"
_PLACE = "the upstream refuses this server"
_MODEL_CODES = (
    r"model_?not_?(?:found|available|supported)|model_access_denied|(?:unknown|invalid)_model"
    r"|deploymentnotfound|\b1211\b"
)
_NO_MODEL = (
    r"\bmodels?\b.{0,200}(?:\bnot (?:exist|found)|does ?n[o']t exist|unknown|is not a valid model)|模型不存在"
    r"|^(?:unknown|invalid|no such|unsupported) model\b|invalid model name|is not a valid model"
)
_MODEL_ACCESS = _NO_MODEL + (
    r"|\bmodels?\b.{0,200}(?:\bnot |denied|unavailable|unsupported|restricted|only available|requires)"
    r"|(?:access|permi|allowed|authori[sz]ed|entitled|eligible|verified|unknown|invalid|unsupported|no such|available|support"
    r"|subscribe|upgrade|\buse\b).{0,120}\bmodels?\b"
)
_FLAGGED = (
    r"flagged|moderation|content.?(?:policy|filter|management|violation|safety|exists risk)|guardrail|unsafe|harmful"
    r"|sensitive|prohibited|usage polic|safety|inappropriate"
)
_DEAD_KEY = (
    r"(?:invalid|incorrect|wrong|missing|expired|revoked|bad|no)\b[\w -]{0,20}(?:key\b|token\b|credential|authentication)"
    r"|(?:key|token|credential|account|organi[sz]ation|project|workspace|team)s?\b.{0,60}"
    r"(?:invalid|incorrect|not valid|expired|revoked|leaked|disabled|deactivated|suspended|terminated|banned)"
    r"|missing scopes|access.{0,20}terminated"
)
_SPENT = (
    r"quota|billing|credit|balance|payment|insufficient funds|spending|arrears|budget|(?:key|usage|monthly) limit"
    r"|余额|欠费"
)

UPSTREAM_ERRORS = [
    # this request asks for more than is left, or for more than one may ask for at once
    ErrorRule(
        (400, 402, 403),
        "",
        r"fewer max_tokens|can only afford|prompt tokens limit exceeded",
        "refused",
    ),
    ErrorRule((429,), "", r"^request too large|input or output tokens must be reduced", "refused"),
    ErrorRule((413,), "rate_limit_exceeded", "tokens per minute", "refused"),
    ErrorRule(
        (402, 403, 451), "web_page", "", "refused"
    ),  # of a firewall: its pattern is in the request
    # our key, beyond doubt
    ErrorRule(
        (),
        r"invalid_api_key|api_key_invalid|wrong_api_key|token_not_found_in_db|expired_key|account_deactivated"
        r"|organization_restricted",
        r"^(?:incorrect api key|api[ _]key (?:not valid|not found|expired)|invalid x-api-key)",
        "auth",
        reason=_KEY,
    ),
    ErrorRule(
        (),
        r"insufficient_?(?:quota|balance|credit)|exceeded_current_quota|billing_(?:error|hard_limit|not_active)"
        r"|budget_?exceeded|payment_required|creditserror|\b1113\b",
        r"^(?:your credit balance is too low|insufficient (?:balance|credit|funds)|budget has been exceeded|余额不足"
        r"|您的账户已欠费)",
        "auth",
        reason=_QUOTA,
    ),
    ErrorRule(
        (401, 403),
        "unsupported_country|ip_not_authorized",
        r"country, region|\bip address\b|virtual network",
        "auth",
        reason=_PLACE,
    ),
    ErrorRule((400,), "", "^user location is not supported", "auth", reason=_PLACE),
    # this request: its model, or what it says
    ErrorRule((400, 401, 500, 503), _MODEL_CODES, "", "model", 404),
    ErrorRule((402, 403), _MODEL_CODES, "", "refused"),
    ErrorRule((401, 403), "service_disabled", _DEAD_KEY, "auth", reason=_KEY),
    ErrorRule((400,), "", _NO_MODEL, "model", 404),
    ErrorRule((401,), "", _MODEL_ACCESS, "model", 404),
    ErrorRule((402, 403), "", _MODEL_ACCESS, "refused"),
    ErrorRule((401,), "moderat|flagged|content_policy|content_filter", _FLAGGED, "refused", 403),
    ErrorRule((402, 403), "moderat|flagged|content_policy|content_filter", _FLAGGED, "refused"),
    # our key, as far as one can tell
    ErrorRule((401, 402, 403, 412), _SPENT, _SPENT, "auth", reason=_QUOTA),
    ErrorRule(
        (403,),
        "unauthenticated",
        r"api[ _-]?key|credential|unauthori[sz]ed|authentication|unregistered callers"
        r"|has not been used in project",
        "auth",
        reason=_KEY,
    ),
    ErrorRule((401,), "", "", "auth", reason=_KEY),
    ErrorRule((402,), "", "", "auth", reason=_QUOTA),
    # everything else, by its status
    ErrorRule((403, 451), "", "", "refused"),
    ErrorRule((404,), "", "", "model"),
    ErrorRule((408, 409, 425, 429), "", "", "limit"),
    ErrorRule((498,), "", "", "limit", 429),  # Groq: "capacity exceeded"
    ErrorRule((400, 413, 422), "", "", "request"),
    ErrorRule((501,), "", "", "ability"),
    ErrorRule((503, 529), "", "", "server", 503),
    ErrorRule(tuple(range(500, 600)), "", "", "server", 502),
    ErrorRule((), "", "", "ability"),
]

# The statuses of errors that come without one: within a stream, or in the words of LiteLLM. Names as in "rate_limit_error",
# "RateLimitError" and "RESOURCE_EXHAUSTED", in small letters, without "_" and without "error" at their end.
NAMED_STATUS = {
    name: status
    for status, names in {
        400: "badrequest invalidrequest invalidargument failedprecondition contextwindowexceeded contextlengthexceeded"
        " contentpolicyviolation unsupportedparams rejectedrequest",
        401: "authentication unauthenticated unauthorized invalidapikey",
        402: "billing insufficientquota insufficientcredits paymentrequired budgetexceeded",
        403: "permission permissiondenied forbidden",
        404: "notfound modelnotfound",
        413: "requesttoolarge",
        422: "unprocessableentity",
        429: "ratelimit ratelimitexceeded ratelimited toomanyrequests resourceexhausted routerratelimit routerratelimiterrorbasic",
        500: "api internal internalserver server apiconnection apiresponsevalidation jsonschemavalidation",
        503: "serviceunavailable unavailable midstreamfallback",
        504: "timeout deadlineexceeded",
        529: "overloaded",
    }.items()
    for name in names.split()
}
_LITELLM = re.compile(r"litellm\.(?:[a-z_]{1,20}\.){0,3}([A-Z]\w{2,60})")


def named_status(*names: Any) -> Optional[int]:
    """The status that the first known name of an error stands for."""
    keys = (re.sub(r"_|error$", "", name.lower()) for name in names if isinstance(name, str))
    return next((NAMED_STATUS[key] for key in keys if key in NAMED_STATUS), None)


def litellm_status(text: str) -> Optional[int]:
    """The status of an error that LiteLLM has put into words, "litellm.RateLimitError: ..."; None if it is none."""
    status = named_status(*_LITELLM.findall(text[:4000]))
    inner = (
        re.search(r"""["']code["']: ?["']?(4[0-9][0-9])\b""", text[:4000])
        if status and status >= 500
        else None
    )
    return int(inner[1]) if inner else status


def error_fields(body: Any, depth: int = 6) -> Dict[str, Any]:
    """The error object within a body in any of the usual shapes; the text of one that is no JSON as "message".

    {"error": {...}}, {"error": "..."}, {"errors": [...]}, {"detail": ...}, {"object": "error", ...}, or a list of those.
    """
    if isinstance(body, list):
        body = body[0] if body else None
    if isinstance(body, str):
        inner = (
            json_or_none(body.encode("utf-8", "replace"))
            if depth and body.lstrip()[:1] in ("{", "[")
            else None
        )
        return (
            error_fields(inner, depth - 1) if isinstance(inner, (dict, list)) else {"message": body}
        )
    body = as_dict(body)
    error = body.get("error") or body.get("errors")
    if isinstance(error, str) and isinstance(body.get("message"), str):
        return body  # {"statusCode": 401, "error": "Unauthorized", "message": "..."}
    if isinstance(error, (dict, str, list)) and error and depth:
        return {
            **{name: body[name] for name in ("code", "type", "status") if name in body},
            **error_fields(error, depth - 1),
        }
    message = body.get("message")
    if isinstance(message, str) and message.lstrip()[:1] == "{" and depth:
        return {**body, **error_fields(message, depth - 1)}  # a provider's own body, as a text
    return body


def error_words(value: Any, depth: int = 4) -> str:
    """A message as a sentence: a text, or FastAPI's list of what is wrong where."""
    if isinstance(value, str) or not depth:
        return value if isinstance(value, str) else ""
    if isinstance(value, list):
        return "; ".join(filter(None, (error_words(item, depth - 1) for item in value[:8])))
    value = as_dict(value)
    location = ".".join(str(step) for step in as_list(value.get("loc"))[:8] if step != "body")
    names = ("message", "msg", "detail", "error", "title", "error_msg", "errorMessage")
    words = next(filter(None, (error_words(value.get(name), depth - 1) for name in names)), "")
    raw = as_dict(value.get("metadata")).get("raw")  # OpenRouter: what the provider itself said
    if isinstance(raw, str) and words == "Provider returned error":
        words += ": " + inner_message(error_words(error_fields(raw), depth - 1))
    return f"{location}: {words}" if location else words


_INNER = re.compile(
    r"""["']message["']: ?(?:"((?:[^"\\]|\\.){1,4000})"|'((?:[^'\\]|\\.){1,4000})')""", re.S
)
_WRAPPED = re.compile(
    r"(?:(?:litellm\.)?(?:[a-z_]{1,20}\.){0,3}[A-Z]\w{2,60}: ?|\w{1,60}Exception - "
    r"|Error code: [0-9]{3} - ){1,8}"
)
_DETAILS = re.compile(
    r"\.? ?(?:Received Model Group=|Available Model Group|No fallback model group|LiteLLM Retried:"
    r"|Deployments=|Passed model=|model=\S{1,200} content_policy_fallback|Error doing the fallback)"
)


def inner_message(text: str) -> str:
    """The words of an error without what LiteLLM and the AI SDK put around them."""
    text = re.sub(r"^Failed after \d{1,4} attempts[^:]{0,40}: ", "", text[:8000])
    if "litellm." in text or "Exception - " in text:
        for _ in range(3):  # one within the other, as JSON or as Python writes it
            inner = _INNER.search(text)
            if not inner:
                break
            text = re.sub(r"\\([\"'\\/])", r"\1", inner[1] or inner[2])
        wrapped = _WRAPPED.match(text)
        text = text[wrapped.end() :] if wrapped else text
        details = _DETAILS.search(text)
        text = text[: details.start()] + "." if details and details.start() > 1 else text
    return text.strip()


def page_or_text(data: bytes) -> Any:
    """An error's body that is no JSON: its text, or what a web page is called."""
    text = data[:4000].decode("utf-8", "replace").strip()
    if not re.match(r"<(?:!doctype|html|head|body|\?xml)\b", text, re.I):
        return text
    title = re.search(r"<title[^>]{0,80}>([^<]{1,200})", text, re.I)
    return {
        "type": "web_page",
        "message": "It answered with a web page" + (f": {title[1].strip()}." if title else "."),
    }


def error_from_body(
    upstream_name: str,
    status: int,
    body: Any,
    secrets: Iterable[str] = (),
    headers: Optional[Dict[str, str]] = None,
    models: Iterable[str] = (),
) -> APIError:
    """What an upstream's error body says, as the client is to read it. Status 200: an error where an answer should be.

    ``body`` is a value of JSON, or the bytes of something else; ``models``: the names of the model that was asked for.
    """
    if isinstance(body, bytes):
        body = page_or_text(body)
    fields, http = error_fields(body), status
    words = error_words(fields)
    status = error_status(status, fields, words)
    text = inner_message(words) or (
        to_json(body).decode()[:300] if body else f"It answered with status {status}."
    )
    message = redact(text[:4000], secrets)[:1000]
    named = {
        name: redact(fields[name][:1000], secrets)[:200]
        for name in ("type", "code", "param")
        if isinstance(fields.get(name), str)
    }
    codes = error_codes(fields)
    if re.fullmatch("[0-9]{3}", named.get("code", "")):
        del named["code"]  # LiteLLM: the status
    rule = next(
        rule for rule in UPSTREAM_ERRORS if rule.matches(status, codes, _own_words(text, models))
    )
    wait = retry_after_seconds(
        headers or {},
        as_dict(body[0] if isinstance(body, list) and body else body),
        message=words,
        limit=rule.category == "limit",
    )
    error = _error_from_rule(rule, upstream_name, status, message, named, wait)
    error.upstream_status = status if http == 200 else http
    if names_model(body, words, models) if error.category == "limit" else "litellm.Auth" in words:
        error.cooldown_scope = "model"  # LiteLLM: the key of one of its models is bad, ours is not
    return error


def _own_words(text: str, models: Iterable[str]) -> str:
    """A message without what it quotes: a client must not be able to put words into it by its model's name."""
    for name in filter(None, models):
        text = text.replace(name, "*")
    return (
        re.sub(r"`[^`\n]{0,200}`|\"[^\"\n]{0,200}\"", "*", text[:4000]).replace("\n", " ").lower()
    )


def _error_from_rule(
    rule: ErrorRule,
    upstream_name: str,
    status: int,
    message: str,
    named: Dict[str, str],
    wait: Optional[float],
) -> APIError:
    """The error of a row: its status, its words, and whose they are."""
    code, seen = named.get("code"), rule.status or status
    if rule.category == "auth":
        status_note = (
            f" ({status})" if rule.reason != _QUOTA else ""
        )  # LiteLLM takes any "429" for a limit, and repeats it
        return auth_error(f"{upstream_name}: {rule.reason}{status_note}: {message}", status)
    if rule.category in ("request", "refused"):
        if named.get("type") == "web_page":
            named = {"code": "upstream_blocked"} if rule.category == "refused" else {}
            message = f"{upstream_name}: {message}"
        return APIError(
            seen,
            message,
            category=rule.category,
            retry=False if rule.category == "refused" else None,
            **named,
        )
    message = f"{upstream_name}: {message}"
    if rule.category == "model":
        return APIError(
            seen, message, param="model", code=code or "model_not_found", category="model"
        )
    if rule.category == "limit":
        return APIError(seen, message, code=code, category="limit", retry_after=wait)
    if rule.category == "ability":  # it can't do that; what it can do, it does as before
        return APIError(
            seen if 400 <= seen < 600 else 502,
            message,
            code=code or "upstream_error",
            category="ability",
        )
    return APIError(
        seen,
        message,
        code=code or "upstream_error",
        category="limit" if wait else "server",
        retry_after=wait,
    )


def auth_error(message: str, status: int) -> APIError:
    """The upstream refuses what is ours: a status that no client repeats, and none that speaks of the client's own token."""
    return APIError(
        424,
        message,
        type="invalid_request_error",
        code="upstream_auth",
        category="auth",
        retry=False,
        upstream_status=status,
    )


def error_status(status: int, fields: Dict[str, Any], words: str) -> int:
    """The status that an error has, or should have."""
    if status >= 500:
        return litellm_status(words) or status
    if status != 200:
        return status
    for value in (
        fields.get("code"),
        fields.get("status"),
        fields.get("raw_status_code"),
        fields.get("http_code"),
    ):
        if type(value) in (int, str) and re.fullmatch("[45][0-9]{2}", str(value)):
            return int(value)
    return (
        named_status(fields.get("code"), fields.get("type"), fields.get("status"))
        or litellm_status(words)
        or 502
    )


def error_codes(fields: Dict[str, Any]) -> str:
    """All of an error that is a name rather than a sentence, in one line."""
    metadata = as_dict(fields.get("metadata"))
    reasons = ["moderation"] if as_list(metadata.get("reasons")) else []  # OpenRouter
    details = [as_dict(item).get("reason") for item in as_list(fields.get("details"))[:8]]  # Google
    names = [
        fields.get("code"),
        fields.get("type"),
        fields.get("status"),
        metadata.get("error_type"),
        *reasons,
        *details,
    ]
    return " ".join(str(name)[:200] for name in names if isinstance(name, (str, int))).lower()


def names_model(body: Any, words: str, models: Iterable[str]) -> bool:
    """Does a limit concern one model only?"""
    text = f"{words[:2000]} {_encode(body)[:8000]}".lower()
    return bool(
        re.search(
            r"\bmodel ?[:=`'\"\\]|this model|permodel|rate limit reached for (?!org|team|user|proj|key|api"
            r"|your|acc|def|req|tok|in |on )\w",
            text,
        )
        or any(
            len(name) > 2 and re.search(rf"(?<!\w){re.escape(name.lower()[:256])}(?!\w)", text)
            for name in models
        )
    )


# Header fields of a controller that hold no secret.
PUBLIC_HEADERS = {
    "accept",
    "accept-language",
    "anthropic-beta",
    "anthropic-version",
    "content-type",
    "http-referer",
    "openai-beta",
    "origin",
    "referer",
    "user-agent",
    "x-title",
}
_MASKED_KEY = re.compile(r"[\w-]{0,80}\*{3,}[\w*-]{0,80}|\bsk-[\w-]{0,40}\.{3}[\w-]{1,40}")


def option_secrets(options: ControllerSettings) -> List[str]:
    """What a controller's header fields and its proxy have to hide."""
    found = []
    for name, value in options.headers.items():
        if name.lower() == "cookie":
            found += cookie_values(value)
        elif name.lower() not in PUBLIC_HEADERS:
            found.append(re.sub(r"^(?:(?:bearer|basic|token) |https?://)", "", value, flags=re.I))
    proxy = urllib.parse.urlsplit(options.proxy)
    return [*found, *filter(None, (proxy.password, urllib.parse.unquote(proxy.password or "")))]


def cookie_values(text: str) -> List[str]:
    """The values of some cookies: their names are no secrets."""
    return [
        value.strip()
        for value in (pair.partition("=")[2] or pair for pair in text.split(";"))
        if value.strip()
    ]


def redact(text: str, secrets: Iterable[str]) -> str:
    """A text of an upstream with "***" for each secret in it: whole, cut or encoded, or masked by the upstream itself.

    A secret of less than 8 characters counts only as a word of its own, and of less than 4 not at all.
    """
    if "***" in text or "..." in text:
        text = _MASKED_KEY.sub("***", text)
    return _without_secrets(text, secrets)


def _without_secrets(text: str, secrets: Iterable[str]) -> str:
    for secret in secret_forms(tuple(secrets)):
        if len(secret) < 8:
            text = (
                re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
                if secret in text
                else text
            )
        else:
            text = _without_pieces(text, secret)
    return text


def redact_bytes(data: bytes, secrets: Iterable[str]) -> bytes:
    """Bytes that are passed on without the secrets in them; all else stays as it is."""
    return _without_secrets(data.decode("utf-8", "surrogateescape"), secrets).encode(
        "utf-8", "surrogateescape"
    )


@functools.lru_cache(maxsize=256)
def secret_forms(secrets: Tuple[str, ...]) -> List[str]:
    """Some secrets in all forms in which an error may quote them, the longest first."""
    forms = set()
    for secret in secrets:
        data = secret.encode("utf-8", "replace")
        forms |= {secret, urllib.parse.quote(secret, safe=""), to_json(secret)[1:-1].decode()}
        if len(secret) >= 8:
            forms |= {base64.b64encode(data).decode().rstrip("="), _sha256(secret)}
    return sorted((form for form in forms if len(form) >= 4), key=len, reverse=True)


def _without_pieces(text: str, secret: str) -> str:
    """A text without the pieces of a long secret: 8 characters of its beginning, or 16 from anywhere."""
    spans = []
    for at in range(0, len(secret) - 7, 8):  # each piece of 16 has one of these blocks of 8 in it
        found = text.find(secret[at : at + 8])
        while found >= 0:
            begin, end = found, found + 8
            while (
                begin
                and at - (found - begin)
                and text[begin - 1] == secret[at - (found - begin) - 1]
            ):
                begin -= 1
            while (
                end < len(text)
                and at + end - found < len(secret)
                and text[end] == secret[at + end - found]
            ):
                end += 1
            if found - begin == at or end - begin >= 16:
                spans.append((begin, end))
            found = text.find(secret[at : at + 8], end)
    parts, done = [], 0
    for begin, end in sorted(spans):
        parts += [text[done:begin], "***"] if begin >= done else []
        done = max(done, end)
    return "".join([*parts, text[done:]])


class AkashSession:
    """The one session of an Akash Chat server: its cookie, fetched when first needed.

    The cookie lives for its Max-Age (session-ok), counted from before it was asked for. In the last
    fifth of that time a thread of its own fetches the next while everybody goes on with the old
    one. A server without sessions sets none, or a fixed word (noredis-session); that is no error.
    The request carries no cookie: the 2026 version would extend nothing (session-valid-cookie).
    """

    PATH = "/api/auth/session/"
    REFRESH_RETRY = 10.0  # seconds between two tries to renew

    def __init__(
        self,
        transport: Transport,
        token: str = "",
        seconds: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        secrets: Iterable[str] = (),
    ) -> None:
        self.transport, self.seconds, self.clock = transport, seconds, clock
        self.tokens = (
            [token, _sha256(token)] if token else [""]
        )  # plain in 2026, as a hash in 2025 (at-session-*)
        self.secrets = [*self.tokens, *secrets]
        self.single_flight = SingleFlight()
        self.cookie: Optional[str] = None  # "session_token=..."; "" where the server sets none
        self.refresh_at = self.expires_at = 0.0
        self.refreshing = False
        self.refresh_count = 0

    def get(self, scope: CancelScope) -> str:
        """The cookie to send."""
        now = self.clock()
        cookie = self.cookie
        if cookie is None or now >= self.expires_at:
            self.single_flight.run(lambda: self._replace(cookie), scope)
            return self.cookie or ""
        if now >= self.refresh_at and not self.refreshing:
            self.refreshing, self.refresh_at = True, now + self.REFRESH_RETRY
            if not start_thread(self._refresh, "akash session"):
                self.refreshing = False
        return cookie

    def invalidate(self, cookie: str) -> None:
        """The server has refused it: who asks next fetches a new one."""
        if self.cookie == cookie:
            self.cookie = None

    def _replace(self, old: Optional[str]) -> None:
        """Fetch a new cookie, unless somebody else has done so meanwhile."""
        if self.cookie in (None, old):
            self.cookie = None
            self._fetch()

    def _refresh(self) -> None:
        try:
            self._fetch()
        except APIError as error:
            log.warning(
                "the session could not be renewed, the old one serves on: %s", error.message
            )
        finally:
            self.refreshing = False

    def _fetch(self) -> None:
        asked_at = self.clock()
        for token in list(self.tokens):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            response = self.transport.fetch(
                "GET", self.PATH, CancelScope(), headers=headers, first_byte=self.seconds
            )
            answer = response.json()
            if is_challenge_page(response):
                raise challenge_page_error(response)
            if response.status == 200:
                self.tokens.sort(key=lambda other: other != token)  # the server may change its mind
                return self._store_cookie(response.headers.get("set-cookie", ""), asked_at)
            if response.status != 403:
                break
        reason = redact(str(as_dict(answer).get("error", ""))[:4000], self.secrets)[:200]
        if "ccess token" in reason:
            raise auth_error(
                f"Akash Chat wants an access token, or another one ({reason}): set AKASH_ACCESS_TOKEN.",
                response.status,
            )
        raise APIError(
            503,
            f"Akash Chat gives no session now (status {response.status}).",
            code="upstream_session",
            retry_after=5,
            category="network",
            upstream_status=response.status,
        )

    def _store_cookie(self, set_cookie: str, asked_at: float) -> None:
        self.refresh_count += 1
        for line in set_cookie.split("\n"):
            match = re.match(r"(session_token=[^;,\s\"\\]*)(.*)", line)
            if match and match[1] != "session_token=":
                life = re.search(r";\s*max-age=([0-9]{1,9})\s*(?:;|$)", match[2], re.I)
                seconds = float(life[1]) if life else math.inf
                self.refresh_at, self.expires_at = asked_at + seconds * 0.8, asked_at + seconds
                self.cookie = match[1]
                return
        self.cookie, self.refresh_at, self.expires_at = "", math.inf, math.inf


def _sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


# The fields that ask for what Akash can't do, and the values that do not ask for it.
AKASH_UNSUPPORTED: Dict[str, List[Any]] = {
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "n": [1],
    "best_of": [1],
    "logprobs": [False, 0],
    "top_logprobs": [0],
    "audio": [],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
    "suffix": [""],
}
AKASH_SUPPORTED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "topP",
    "stop",
    "max_tokens",
    "max_completion_tokens",
}

# Texts that crash the server's tokenizer (req-special-*), and the same with a mark of no width in it.
SPECIAL_TOKENS = re.compile(r"<\|(?=(?:endoftext|fim_prefix|fim_middle|fim_suffix|endofprompt)\|>)")
ESCAPED = "<|\u2060"


def akash_request(call: Call) -> Tuple[Dict[str, Any], List[str]]:
    """The body for POST /api/chat/, and the fields that it drops. APIError 400 for what Akash can't do."""
    body = {name: value for name, value in call.body.items() if value is not None}
    others = [name for name in body if name not in AKASH_SUPPORTED]
    for name in others:
        if name in AKASH_UNSUPPORTED and body[name] not in AKASH_UNSUPPORTED[name]:
            raise bad_request(
                f"Akash Chat does not support {name!r}"
                f"{' of more than 1' if name in ('n', 'best_of') else ''}.",
                name,
                "unsupported_parameter",
            )
    system, messages = [], []
    for at, message in enumerate(body["messages"]):
        if message.get("role") in ("system", "developer"):
            system.append(_text_and_images(message, f"messages[{at}]")[0])
        else:
            messages.append(_akash_message(message, f"messages[{at}]"))
    if not messages:
        raise bad_request("'messages' needs a message of the user beside the system's.", "messages")
    return {
        "id": new_id()[:16],
        "messages": messages,
        "model": call.model,
        # an empty one would bring in the server's own persona (req-system-empty), a blank does not
        "system": SPECIAL_TOKENS.sub(ESCAPED, "\n\n".join(filter(None, system))) or " ",
        # 0 and absence would mean the model's default, or an error in 2026 (text-notemperature)
        "temperature": number_field(body, "temperature", 0.85) or 1e-6,
        "topP": number_field(body, "topP" if "topP" in body else "top_p", 1.0) or 1e-6,
        "context": [],
    }, [name for name in others if name not in AKASH_UNSUPPORTED]


def _akash_message(message: Dict[str, Any], param: str) -> Dict[str, Any]:
    role = message.get("role")
    if role not in ("user", "assistant"):
        raise bad_request(
            f"{param}: Akash Chat has no role {str(role)[:80]!r}; use system, developer, user or assistant.",
            f"{param}.role",
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise bad_request(
            f"{param}: Akash Chat can't be told about calls of tools.", f"{param}.tool_calls"
        )
    text, images = _text_and_images(message, param)
    counted = SPECIAL_TOKENS.sub(ESCAPED, text)
    result: Dict[str, Any] = {"role": role, "content": counted}
    if (
        counted != text
    ):  # the model gets the parts, the tokenizer the content (req-parts-with-content)
        result["parts"] = [{"type": "text", "text": text}]
    if images:
        result["experimental_attachments"] = images
    return result


def _text_and_images(message: Dict[str, Any], param: str) -> Tuple[str, List[Dict[str, str]]]:
    """A message's text, and its pictures as Akash's attachments (req-attachment-dataurl)."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise bad_request(f"{param}.content must be text or a list of parts.", f"{param}.content")
    texts, images = [], []
    for at, part in enumerate(map(as_dict, content)):
        part_param, kind = f"{param}.content[{at}]", part.get("type")
        value = part.get(str(kind))
        text = part.get("text", value)
        if kind in ("text", "refusal", "input_text", "output_text") and isinstance(text, str):
            texts.append(text)
        elif kind == "image_url":
            images.append(
                _attachment(value.get("url") if isinstance(value, dict) else value, part_param)
            )
        else:
            unsupported = str(part if kind == "text" else kind)[:80]
            raise bad_request(
                f"{part_param}: Akash Chat takes text and pictures, not {unsupported!r}.",
                part_param,
            )
    if images and message.get("role") != "user":
        raise bad_request(
            f"{param}: only messages of the user may hold pictures.", f"{param}.content"
        )
    return "".join(texts), images


def _attachment(url: Any, param: str) -> Dict[str, str]:
    match = (
        re.match(r"data:(image/[a-z0-9.+-]+);base64,|https?://", url, re.I)
        if isinstance(url, str)
        else None
    )
    if not match:
        raise bad_request(
            f"{param}: a picture's url must be http(s): or data:image/...;base64,...", param
        )
    return {"name": "picture", "contentType": (match[1] or "image/png").lower(), "url": url}


def number_field(
    body: Dict[str, Any], name: str, default: Any, integer: bool = False, minimum: float = 0
) -> Any:
    """A number of the request; APIError 400 if it is something else or too small."""
    value = body.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int if integer else (int, float))
        or not abs(value) < 1e15
    ):
        raise bad_request(f"{name!r} must be a {'whole ' if integer else ''}number.", name)
    if value < minimum:
        raise bad_request(f"{name!r} must be at least {minimum:g}.", name)
    return value


MAX_STOP_LENGTH = 1000  # characters of one stop sequence


def stop_sequences(body: Dict[str, Any]) -> List[str]:
    """OpenAI's ``stop``: a text or up to four."""
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_request("'stop' must be a text or a list of texts.", "stop")
    if len(stops) > 4:
        raise bad_request("'stop' may hold four texts.", "stop")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise bad_request(
            f"Invalid 'stop': string too long. Expected strings with maximum length {MAX_STOP_LENGTH}.",
            "stop",
            "string_above_max_length",
        )
    return [stop for stop in stops if stop]


FINISH_REASONS = {
    "stop": "stop",
    "length": "length",
    "content-filter": "content_filter",
    "tool-calls": "tool_calls",
}

# What an error text of the upstream means, where LiteLLM's class does not tell: a pattern, the status, the code.
AKASH_ERRORS = [
    (r"rate limit|too many requests|no deployments available|max parallel request", 429, None),
    (r"contentpolicyviolation", 400, "content_policy_violation"),
    (
        r"maximum context length|contextwindowexceeded|too large|too long",
        400,
        "context_length_exceeded",
    ),
    (
        r"invalid prompt|unsupported role|invalid argument|bad request|unprocessable|invalid data content",
        400,
        None,
    ),
    (r"authentication error|api key|unauthorized", 401, "upstream_auth"),
    (r"timed? ?out|timeout", 504, "upstream_error"),
    (r"service unavailable|overloaded", 503, "upstream_error"),
    (r"", 502, "upstream_error"),
]


def akash_error(text: str, model: str, secrets: Iterable[str] = ()) -> APIError:
    """What an error part of the stream means (model-unknown, err-*). Inner addresses are taken out.

    It comes from what is behind Akash Chat, mostly LiteLLM, so a limit is one of the model.
    """
    text = text[:4000]
    status, code = litellm_status(text), None
    if status == 404 or re.search(r"invalid model name|model \S{1,200} does not exist", text, re.I):
        if model in (
            "",
            AkashController.IMAGE_MODEL,
        ):  # all that 2025's version says of a failure (gen-imgbackend-error)
            return APIError(
                502,
                "Akash Chat could not make the picture, or has no AkashGen.",
                code="image_failed",
                retry=False,
                legacy_message="Error Model.",
            )
        return akash_model_not_found(model)
    by_words = next(
        (status, code) for pattern, status, code in AKASH_ERRORS if re.search(pattern, text, re.I)
    )
    status = status or by_words[0]
    if status == by_words[0] or status >= 500:
        code = by_words[1] or ("upstream_error" if status >= 500 else None)
    reason = redact(inner_message(text).split("\n")[0], secrets)
    reason = (
        "" if reason in ("[object Object]", "An error occurred.") else redact_hosts(reason)[:300]
    )
    message = f"Akash Chat: {reason}" if reason else "Akash Chat failed without a reason."
    if status in (
        401,
        402,
        403,
    ):  # a key of the server behind Akash Chat: this model's affair, not our session's
        return APIError(
            424,
            message,
            code="upstream_auth",
            category="refused",
            retry=False,
            cooldown_scope="model",
        )
    status, wait = (
        {500: 502, 529: 503}.get(status, status),
        retry_after_seconds({}, {}, message=text),
    )
    if status == 429 or status >= 500 and wait:
        return APIError(
            status, message, code=code, category="limit", cooldown_scope="model", retry_after=wait
        )
    return APIError(status, message, code=code)


def redact_hosts(text: str) -> str:
    """A text without addresses: an upstream's errors may name its inner hosts (err-backend-refused)."""
    text = text[:1000]  # it may be anything, of any length
    text = re.sub(r"(?<![a-z])[a-z]+://[^\s'\"]+", "(address)", text, flags=re.I)
    return re.sub(
        r"(?:\b\d{1,3}(?:\.\d{1,3}){3}|(?<![0-9a-z:])\[?[0-9a-f:]*::[0-9a-f:.]*\]?"
        r"|(?<![a-z0-9.-])[a-z0-9-]+(?:\.[a-z0-9-]+)+(?=:\d)|(?<![a-z0-9-])[a-z0-9-]+(?=:\d{2,5}\b))(?::\d{1,5})?",
        "(address)",
        text,
        flags=re.I,
    )


_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_TEXT = re.compile(rb'0:("[ !#-\[\]-~]+")\n')  # nothing escaped


class AkashDecoder:
    r"""Akash's stream, in either framing, told apart line by line.

    AI SDK 4, ``CODE:JSON`` (text-short):        AI SDK 5 to 7, events (sdk5-text):

        f:{"messageId":"msg-1"}                      data: {"type":"start"}
        0:"Hello"            Text                    data: {"type":"text-delta","delta":"Hello"}
        g:"Let me"           Reasoning               data: {"type":"reasoning-delta","delta":"Let me"}
        9:{"toolName":...}   ToolCall                data: {"type":"tool-input-available",...}
        3:"terminated"       an error                data: {"type":"error","errorText":"..."}
        e:{...}              a step ends             data: {"type":"finish-step"}
        d:{"finishReason":"stop",                    data: {"type":"finish","finishReason":"stop"}
           "usage":{...}}    Finish                  data: [DONE]

    Other codes and types are skipped. All texts of one read become one event. An answer without
    its Finish is an error, and so is one whose reason is "error", "unknown" or "other": it was cut
    short (finish-none). Lines end with the byte "\n" only: U+2028 and its kin stand raw inside.
    A part that is a whole thought (2026: reasoning-content) is told here, where its ends are known.
    """

    LINE_LIMIT = 8 << 20
    THOUGHT = "<think>\n", "\n</think>\n\n"

    def __init__(self, model: str = "", secrets: Iterable[str] = ()) -> None:
        self.model, self.secrets = model, secrets
        self.buffer = bytearray()  # a line that has not ended yet
        self.pending_surrogate = ""  # the first half of a surrogate pair (text-lonesurrogate)
        self.tools = 0
        self.finished = False
        self.error: Optional[APIError] = None  # to be raised once the events before it are used

    def feed(self, data: bytes) -> List[Event]:
        single = self.single_text(data)
        if single:
            return [Text(single[1:-1].decode())]
        out: List[Event] = []
        others, *texts = (b"\n" + take_complete_lines(self.buffer, data)).split(b"\n0:")
        for joined, texts, others in [(b"", [], others), *self._runs(texts)]:
            if joined and not self.finished and not self.error:
                self._texts(joined, texts, out)
            for line in others.split(b"\n"):
                if line and not self.finished and not self.error:
                    self._line(line, out)
        if self.finished or self.error:
            self.buffer.clear()
        elif len(self.buffer) > self.LINE_LIMIT:
            self._fail("Akash Chat sent a line without an end.")
        return out

    @staticmethod
    def _runs(lines: List[bytes]) -> List[Tuple[bytes, List[bytes], bytes]]:
        """Texts that follow one another, joined by commas and as they are, and the other lines after those.

        Each of ``lines`` is a text, with the other lines after it.
        """
        if not lines:
            return []
        last, _, others = lines.pop().partition(b"\n")
        lines.append(last)
        joined = b",\n".join(
            lines
        )  # JSON allows no line break in a string, so that no line can reach into the next
        if joined.count(b"\n") < len(lines):  # the usual
            return [(joined, lines, others)]
        runs: List[Tuple[bytes, List[bytes], bytes]] = []
        texts: List[bytes] = []
        for line in lines:
            text, malformed, between = line.partition(b"\n")
            texts.append(text)
            if malformed:
                runs.append((b",\n".join(texts), texts, between))
                texts = []
        return [*runs, (b",\n".join(texts), texts, others)]

    def single_text(self, data: bytes) -> bytes:
        """The JSON of a text that comes alone, as where tokens come one by one; else b""."""
        match = (
            None
            if self.buffer or self.pending_surrogate or self.finished or self.error
            else _LONE_TEXT.fullmatch(data)
        )
        return match[1] if match else b""

    def close(self) -> List[Event]:
        """The message has ended: that must not be news."""
        out = (
            self.feed(b"\n") if self.buffer.strip() else []
        )  # a last line may lack its end, but not more
        if self.error and self.error.message == MALFORMED_LINE:
            self.error = None
        if not self.finished:
            self._fail("Akash Chat ended its answer early.")
        return out

    def _line(self, line: bytes, out: List[Event]) -> None:
        try:
            if line[1:2] == b":" and line[:1].isalnum():
                if line[:1] in b"g39d":
                    self._on_v4_part(
                        line[:1], _decode_any(line[2:].decode("utf-8", "surrogatepass")), out
                    )
            elif line.startswith(b"data:"):
                self._on_v5_event(line[5:].strip(), out)
            elif not line.startswith((b":", b"event:", b"id:", b"retry:", b"\r")):
                page = re.match(rb"\s*<(!doctype|html|head|body)\b", line, re.I)
                self._fail(
                    CHALLENGE_PAGE if page else "Akash Chat sent something that is no stream.",
                    "upstream_blocked" if page else "upstream_error",
                )
        except (ValueError, RecursionError):
            self._fail(MALFORMED_LINE)

    def _on_v4_part(self, code: bytes, value: Any, out: List[Event]) -> None:
        if code == b"g" and isinstance(value, str):
            self._emit(Reasoning, value, out)
        elif code == b"3":
            self.error = akash_error(str(value), self.model, self.secrets)
        elif code == b"9" and isinstance(value, dict):
            self._tool(value, value.get("args"), out)
        elif code == b"d" and isinstance(value, dict):
            self._finish(value.get("finishReason"), value.get("usage"), out)

    def _on_v5_event(self, data: bytes, out: List[Event]) -> None:
        if data == b"[DONE]":
            self._fail("Akash Chat ended its answer early.")
            return
        event = as_dict(_decode_any(data.decode("utf-8", "surrogatepass")))
        kind = event.get("type")
        if kind == "text-delta":
            self._emit(Text, str(event.get("delta", "")), out)
        elif kind == "reasoning-delta":
            self._emit(Reasoning, str(event.get("delta", "")), out)
        elif kind == "tool-input-available":
            self._tool(event, event.get("input"), out)
        elif kind in ("error", "tool-input-error"):
            self.error = akash_error(str(event.get("errorText", "")), self.model, self.secrets)
        elif kind == "abort":
            self._fail("Akash Chat broke off its answer.")
        elif kind == "finish":
            metadata = as_dict(event.get("messageMetadata"))
            self._finish(
                event.get("finishReason", "stop"),
                metadata.get("totalUsage") or metadata.get("usage"),
                out,
            )

    def _texts(self, joined: bytes, lines: List[bytes], out: List[Event]) -> None:
        """The JSON texts of some lines, which are read at once if each is one text, else line by line."""
        try:
            texts = _decode_any((b"[%b]" % joined).decode("utf-8", "surrogatepass"))
            text = "".join(texts)
            if len(texts) != len(lines) > 1:
                raise ValueError("the lines are not what they are together")
        except (ValueError, TypeError, RecursionError):
            return self._one_by_one(lines, out)
        if "<think>\n" in text:
            for text in texts:
                begins, ends = self.THOUGHT
                if text.startswith(begins) and text.endswith(ends):
                    self._emit(Reasoning, text[len(begins) : -len(ends)], out)
                else:
                    self._emit(Text, text, out)
        elif self.pending_surrogate or not text.isascii() and _SURROGATE.search(text):
            self._emit(Text, text, out)
        elif text:
            out.append(Text(text))

    def _one_by_one(self, lines: List[bytes], out: List[Event]) -> None:
        if len(lines) == 1:
            return self._salvage(lines[0], out)
        for line in lines:
            if line and not self.error:
                self._texts(line, [line], out)

    def _salvage(self, line: bytes, out: List[Event]) -> None:
        """The texts of a line are broken; those before the mistake are good."""
        scan, text, at = json.JSONDecoder().raw_decode, line.decode("utf-8", "replace"), 0
        with contextlib.suppress(ValueError, RecursionError):
            while at < len(text):
                value, at = scan(text, at)
                if not isinstance(value, str):
                    break
                self._emit(Text, value, out)
                at += text.startswith(",", at)
        self._fail(MALFORMED_LINE)

    def _emit(self, kind: Callable[[str], Event], text: str, out: List[Event]) -> None:
        """Add a text, its surrogate halves joined; a first half waits for its second."""
        text, self.pending_surrogate = self.pending_surrogate + text, ""
        if text[-1:] and "\ud800" <= text[-1] <= "\udbff":
            text, self.pending_surrogate = text[:-1], text[-1]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if text:
            out.append(kind(text))

    def _tool(self, call: Dict[str, Any], arguments: Any, out: List[Event]) -> None:
        if self.tools == MAX_TOOL_CALLS:
            self.error = too_many_calls("Akash Chat")
            return
        out.append(
            ToolCall(
                self.tools,
                _encode(arguments),
                str(call.get("toolCallId")),
                str(call.get("toolName")),
            )
        )
        self.tools += 1

    def _finish(self, reason: Any, usage: Any, out: List[Event]) -> None:
        if self.pending_surrogate:
            self.pending_surrogate = ""
            out.append(Text("\ufffd"))
        if isinstance(reason, str) and reason in FINISH_REASONS:
            self.finished = True
            out.append(Finish(FINISH_REASONS[reason], _akash_usage(usage)))
        elif reason == "error":
            self._fail("Akash Chat failed within its answer.")
        else:
            self._fail("Akash Chat ended its answer early: its model gave no reason to end.")

    def _fail(self, message: str, code: str = "upstream_error") -> None:
        self.error = self.error or APIError(502, message, code=code, category="network")


def is_challenge_page(response: UpstreamResponse) -> bool:
    """Is this a page of something in front of the server, such as a challenge?"""
    return "cf-mitigated" in response.headers or response.headers.get(
        "content-type", ""
    ).startswith("text/html")


def challenge_page_error(response: UpstreamResponse) -> APIError:
    """What such a page means for a client: 502, and none of its HTML."""
    return APIError(
        502,
        f"{CHALLENGE_PAGE} (status {response.status})",
        code="upstream_blocked",
        category="network",
        upstream_status=response.status,
    )


MALFORMED_LINE = "Akash Chat sent a broken line."
CHALLENGE_PAGE = "Something in front of Akash Chat answered with a web page instead of it."


def _akash_usage(usage: Any) -> Optional[Dict[str, int]]:
    """OpenAI's usage from Akash's; None unless both counts are told (text-short has nulls)."""
    usage = as_dict(usage)
    prompt, completion = (
        next((usage[name] for name in names if count_or_none(usage.get(name)) is not None), None)
        for names in (("promptTokens", "inputTokens"), ("completionTokens", "outputTokens"))
    )
    if prompt is None or completion is None:
        return None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


# The answer of AkashGen. The line is pasted together, not JSON: only ' in the two texts is escaped.
IMAGE_JOB = re.compile(
    r"<image_generation> jobId='([^'\n]*)' prompt='(.*)'</image_generation>", re.S
)
PASTED_IMAGE_JOB = re.compile(r"""^0:"<image_generation> jobId='([^'\n]*)' prompt='""", re.M)
PASTED_IMAGE_JOB_END = re.compile(r"""'</image_generation>"\n(?=e:\{|\Z)""")


def parse_image_job(body: bytes) -> Optional[Tuple[str, str]]:
    """(job, prompt) of an answer of AkashGen, or None if it is something else (gen-ok, gen-all)."""
    text = body.decode("utf-8", "replace")
    start = PASTED_IMAGE_JOB.search(text)
    ends = (
        deque(PASTED_IMAGE_JOB_END.finditer(text, start.end()), maxlen=1) if start else ()
    )  # the last: the prompt may hold one
    if start and ends:
        job, texts = start[1], text[start.end() : ends[0].start()]
    else:
        match = IMAGE_JOB.fullmatch(fold(AkashDecoder().feed(body)).text.strip())
        if not match:
            return None
        job, texts = match.groups()
    parts = re.split(r"(?<!\\)' negative='", texts)
    prompt = "' negative='".join(parts[:-1]) if len(parts) > 1 else texts
    return job, prompt.replace("\\'", "'")


class AkashController(Controller):
    """Akash Chat's web API: text and reasoning streamed, pictures by the model AkashGen."""

    IMAGE_MODEL = "AkashGen"
    CHAT_PATH = "/api/chat/"
    MAX_BODY_BYTES = (
        10_000_000  # bytes: the 2026 version reads no more of a body, and then fails without a word
    )

    def __init__(
        self,
        options: ControllerSettings,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(options, settings)
        self.cookie = settings.akash_cookie if settings.is_akash_server(options.base_url) else ""
        headers = {
            "User-Agent": settings.user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            **options.headers,
            **({"Cookie": self.cookie} if self.cookie else {}),
        }
        self.transport = Transport(options, settings, options.base_url, "Akash Chat", headers)
        self.session = AkashSession(
            self.transport,
            options.api_key,
            settings.session_timeout,
            clock,
            [*cookie_values(settings.akash_cookie), *option_secrets(options)],
        )
        self.model_cache = StaleOnErrorCache(self._fetch_models, settings.models_ttl, clock)

    def check_support(self, call: Call) -> Optional[APIError]:
        try:
            call.prepared_requests[self.name] = self._prepare(call)
        except APIError as error:
            return error
        return None

    def events(self, call: Call) -> Iterable[Event]:
        data, cutoff, call.ignored_params = call.prepared_requests[self.name]
        if call.image_count or call.model == self.IMAGE_MODEL:
            return self.image_events(call, data)
        cookie = self.session.get(call.scope)
        response = self.transport.start_request(
            "POST",
            self.CHAT_PATH,
            call.scope,
            data,
            self._fields(data, cookie),
            force_new_connection=call.retry_reason,
        )
        return EventStream(response, lambda response: self._decoder(call, response, cutoff, cookie))

    def _prepare(self, call: Call) -> Tuple[bytes, StopFilter, List[str]]:
        """The request's bytes, the end of its answer, and what of it is ignored."""
        if call.relay_only:
            raise APIError(404, f"There is no {call.path[:200]!r} here.", code="not_found")
        if call.translation_error:
            raise call.translation_error
        if call.image_count and call.model not in ("", self.IMAGE_MODEL):
            raise bad_request(f"Pictures are made by the model {self.IMAGE_MODEL}.", "model")
        body, ignored = akash_request(call)
        body["model"] = self.options.model_map.get(call.model, call.model) or self.IMAGE_MODEL
        limit = (
            "max_tokens"
            if call.body.get("max_completion_tokens") is None
            else "max_completion_tokens"
        )
        cutoff = StopFilter(
            stop_sequences(call.body), number_field(call.body, limit, None, integer=True, minimum=1)
        )
        return request_json(body, len(call.raw_body)), cutoff, ignored

    def image_events(self, call: Call, data: bytes) -> Iterator[Event]:
        """Ask for each picture, then wait for each; text instead of a picture is passed on as text.

        Where a limit counts requests, each picture is waited for before the next is asked for.
        """
        jobs: List[Tuple[str, str]] = []
        one_by_one = call.one_image_at_a_time or self.options.max_concurrency > 0
        for _ in range(call.image_count or 1):
            call.raise_if_cancelled()  # the upstream finishes a job even if its client has left
            body = self._with_session(
                "POST", self.CHAT_PATH, call.scope, data, model=call.model
            ).read(limit=4 << 20)
            job = parse_image_job(body)
            if job is None:
                yield from self._text_instead(call, body)
                return
            if job[0] in ("", "undefined"):
                raise APIError(
                    502, "Akash Chat could not start the picture.", code="upstream_error"
                )
            if one_by_one:
                yield from self._poll_image(call, *job)
            else:
                jobs.append(job)
        for job, prompt in jobs:
            yield from self._poll_image(call, job, prompt)
        yield Finish("stop")

    def secrets(self, cookie: Optional[str] = None) -> List[str]:
        """What its errors must not show: keys, header values, and the cookies of a request."""
        return [
            *self.session.secrets,
            *cookie_values(self.session.cookie or ""),
            *cookie_values(cookie or ""),
        ]

    def models(self) -> List[Dict[str, Any]]:
        return self.model_cache.get()

    def metrics(self) -> Dict[str, float]:
        return {"akashproxy_session_renewals_total": self.session.refresh_count}

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        path = f"/api/image/{name}" if "." in name else f"/api/image/{name}/"  # image-noext-308
        response = self.transport.fetch("GET", path, scope)
        if response.status == 200 and response.headers.get("content-type", "").startswith("image/"):
            return response
        response.close()
        if response.status in (200, 404):
            raise APIError(404, f"There is no picture {name!r}.", code="not_found")
        raise APIError(
            502,
            f"Akash Chat could not give the picture (status {response.status}).",
            code="upstream_error",
            upstream_status=response.status,
        )

    def _fields(self, data: Optional[bytes], cookie: str) -> Dict[str, str]:
        """The header fields that a request adds."""
        fields = {"Content-Type": "application/json"} if data else {}
        if cookie:
            fields["Cookie"] = "; ".join(filter(None, (cookie, self.cookie)))
        return fields

    def _decoder(
        self, call: Call, response: UpstreamResponse, cutoff: StopFilter, cookie: str
    ) -> Any:
        """What understands the body of an answer: a stream, or a refusal."""
        if response.status == 200 and not is_challenge_page(response):
            return DecoderChain(
                AkashDecoder(call.model, self.secrets(cookie)),
                ThinkTagFilter(),
                *[cutoff] * cutoff.needed,
            )

        def refused(data: bytes) -> List[Event]:
            raise self._session_error(
                response,
                data,
                call.model,
                cookie,
                call.retry_reason == "session",
                len(call.prepared_requests[self.name][0]),
            )

        return BufferedBody(refused, 1 << 20, is_error_body=True)

    def _with_session(
        self,
        method: str,
        path: str,
        scope: CancelScope,
        data: Optional[bytes] = None,
        first_byte: Optional[float] = None,
        model: str = "",
    ) -> UpstreamResponse:
        """A request with the cookie; if the session is refused, once more with a new one."""
        for is_retry in (False, True):
            cookie = self.session.get(scope)
            response = self.transport.fetch(
                method, path, scope, data, self._fields(data, cookie), first_byte
            )
            if response.status == 200 and not is_challenge_page(response):
                return response
            error = self._session_error(
                response, response.read(limit=1 << 20), model, cookie, is_retry, len(data or b"")
            )
            if error.category != "again":
                break
        raise error

    def _session_error(
        self,
        response: UpstreamResponse,
        data: bytes,
        model: str,
        cookie: str,
        is_retry: bool,
        sent: int,
    ) -> APIError:
        """What an answer that is no stream means; the first time that the session is refused, it is tried again."""
        fields = as_dict(json_or_none(data))
        if (
            response.status == 403
            and fields.get("message") == "Unauthorized: Invalid session"
            and not is_retry
        ):
            self.session.invalidate(cookie)
            return APIError(
                502, "Akash Chat refused the session.", code="session", category="again"
            )
        secrets = self.secrets(cookie)
        if response.status == 400 and data and not fields and not is_challenge_page(response):
            error = akash_error("Bad request: " + data.decode("utf-8", "replace"), model, secrets)
        else:
            words = redact(str(fields.get("message") or fields.get("error") or "")[:4000], secrets)
            error = self._status_error(response, fields, words, model, sent)
        error.upstream_status = response.status
        return error

    def _status_error(
        self,
        response: UpstreamResponse,
        fields: Dict[str, Any],
        message: str,
        model: str,
        sent: int,
    ) -> APIError:
        """What another status than 200, or a web page, means; ``fields`` is its JSON."""
        status = response.status
        if is_challenge_page(response):
            return challenge_page_error(response)
        if fields.get("error") == "Model not available":
            if fields.get("available_models") == []:  # chat-models-backend-500
                return APIError(
                    503,
                    "Akash Chat has no models at all now.",
                    code="upstream_error",
                    retry_after=30,
                    category="network",
                )
            return akash_model_not_found(model)
        if status == 429:
            return APIError(
                429,
                f"Akash Chat: {redact_hosts(message)[:300] or 'too many requests.'}",
                retry_after=retry_after_seconds(response.headers, fields, message=message),
            )
        if status in (401, 403):
            return auth_error(
                f"Akash Chat refuses this server ({redact_hosts(message)[:200] or status}).", status
            )
        if status == 413 or status == 500 and not message and sent > self.MAX_BODY_BYTES:
            return APIError(
                413,
                "The request is too large for Akash Chat, which takes 10 MB.",
                category="refused",
                retry=False,
            )
        return self._backend_error(response, fields, message, model)

    def _backend_error(
        self, response: UpstreamResponse, fields: Dict[str, Any], message: str, model: str
    ) -> APIError:
        """The failure of the server, or of what is behind it."""
        status, retry_after = (
            response.status,
            retry_after_seconds(response.headers, fields, message=message, limit=False),
        )
        if message:
            error = akash_error(message, model)
            error = (
                error
                if error.status != 400 or status == 400
                else APIError(502, error.message, code="upstream_error")
            )
        else:
            error = APIError(
                502 if status <= 500 else 503,
                code="upstream_error",
                message=f"Akash Chat failed without a reason (status {status}).",
            )
        if retry_after and error.category == "server":
            error.category, error.retry_after = "limit", retry_after
        return error

    def _text_instead(self, call: Call, body: bytes) -> Iterator[Event]:
        """The text that came in place of a picture (gen-textanswer)."""
        pipeline = DecoderChain(AkashDecoder(call.model, self.secrets()), ThinkTagFilter())
        events = pipeline.feed(body) + pipeline.close()
        if pipeline.error:
            raise pipeline.error
        if call.image_count:
            raise bad_request(
                f"Akash Chat answered with text instead of a picture: {fold(events).text[:500]}",
                "prompt",
                "no_image",
            )
        yield from events

    def _poll_image(self, call: Call, job: str, prompt: str) -> Iterator[Event]:
        """Poll a job: soon at first, then slower, until the picture is there or the time is over."""
        pause, misses, last_progress = self.settings.image_poll, 0, None
        end = time.monotonic() + self.settings.image_timeout
        while True:
            call.sleep(pause)
            pause = min(pause * 1.5, self.settings.image_poll * 6)
            state = self._job_state(call, job)
            fields = state or {}
            status, result = str(fields.get("status") or ""), str(fields.get("result") or "")
            if status == "failed" or result.startswith("Failed"):
                result = redact_hosts(redact(result[:4000], self.secrets()))
                raise APIError(
                    502,
                    f"The picture failed: {result[:200] or 'no reason given'}.",
                    code="image_failed",
                    retry=False,
                )
            if status in ("succeeded", "completed"):
                yield self._fetch_image(call, job, prompt, result)
                return
            misses = 0 if status else misses + (1 if state is None else 4)
            if (
                misses >= 12
            ):  # three times unknown is what the web page takes for lost (imgstatus-unknown, imgstatus-404)
                raise APIError(502, "Akash Chat has lost the picture's job.", code="image_failed")
            if time.monotonic() > end:
                raise APIError(
                    504,
                    f"The picture was not ready within {self.settings.image_timeout:g} seconds.",
                    code="image_failed",
                )
            progress = ImageProgress(status, count_or_none(fields.get("queue_position")) or 0)
            if status and progress != last_progress:
                last_progress = progress
                yield progress

    def _job_state(self, call: Call, job: str) -> Optional[Dict[str, Any]]:
        """What /api/image-status/ tells of a job; {} if it knows none, None if it can't say now."""
        path = "/api/image-status/?ids=" + urllib.parse.quote(job, safe="")
        try:
            response = self.transport.fetch(
                "GET", path, call.scope, first_byte=self.settings.session_timeout
            )
            jobs = response.json()
        except APIError as error:
            log.info("a picture's state: %s", error.message)
            call.new_scope()
            return None
        if response.status >= 500:
            return None
        return (
            as_dict(jobs[0]) if response.status == 200 and isinstance(jobs, list) and jobs else {}
        )

    def _fetch_image(self, call: Call, job: str, prompt: str, result: str) -> Image:
        name = result.rsplit("/", 1)[-1]
        if not IMAGE_NAME.fullmatch(name):
            raise APIError(
                502, "Akash Chat gave the picture a name that can't be used.", code="image_failed"
            )
        data = self.image(name, call.scope).read() if call.images_as_bytes else None
        return Image(job, prompt, name, f"{self.options.base_url}/api/image/{name}", data)

    def _fetch_models(self) -> List[Dict[str, Any]]:
        response = self._with_session(
            "GET", "/api/models/", CancelScope(), first_byte=self.settings.session_timeout
        )
        names = akash_models(json_or_none(response.read(limit=MAX_LIST_BYTES)))
        if not names:
            raise APIError(
                503, "Akash Chat lists no models now.", code="upstream_error", retry_after=30
            )
        return [
            {
                "id": name,
                "object": "model",
                "created": 1626777600,
                "owned_by": "Akash Network",
                "permission": None,
                "root": name,
                "parent": None,
            }
            for name in names
        ]


IMAGE_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")


def akash_models(listing: Any) -> List[str]:
    """The ids of Akash's model list, in any of its shapes (models-*, 2026: models-all); [] if it is none."""
    if isinstance(listing, dict):
        listing = listing.get("models") or listing.get("data")
    entries = [entry for entry in map(as_dict, as_list(listing)) if entry.get("available", True)]
    # in models-all the id is a database key
    return list(
        bounded_model_list(
            "Akash Chat", ((entry.get("model_id") or entry.get("id"), entry) for entry in entries)
        )
    )


MAX_LIST_BYTES, MAX_MODELS = 4 << 20, 10_000  # of an upstream's list of models


def bounded_model_list(
    upstream_name: str, entries: Iterable[Tuple[Any, Dict[str, Any]]]
) -> Dict[str, Dict[str, Any]]:
    """The entries of an upstream's list by usable names, each once. A list that is too long is cut, and that is logged."""
    found: Dict[str, Dict[str, Any]] = {}
    for name, entry in entries:
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME:
            found.setdefault(name, entry)
        if len(found) > MAX_MODELS:
            found.popitem()
            log.warning(
                "%s lists more than %d models; the others are left out", upstream_name, MAX_MODELS
            )
            break
    return found


MAX_RETRY_AFTER = 172800.0  # every limit is tried again within two days


def retry_after_seconds(
    headers: Dict[str, str],
    body: Dict[str, Any],
    now: Callable[[], float] = time.time,
    message: str = "",
    limit: bool = True,
) -> Optional[float]:
    """Seconds until a limit ends, between 1 and two days: by a header field, a field of the body or the message.

    ``limit``: also by the fields that come with every answer of some upstreams. None if it is not said, or not understood.
    """
    delays = [
        _wait(headers.get(name, ""), unit, now)
        for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0))
    ]
    if limit:
        delays.append(_wait_from_headers(headers, now))
    delays += [_wait_from_body(body, now), _wait_in_words(message)]
    return next(
        (min(max(1.0, seconds), MAX_RETRY_AFTER) for seconds in delays if seconds is not None), None
    )


def _wait(value: Any, unit: float, now: Callable[[], float]) -> Optional[float]:
    """The seconds of a span, a moment, a moment in milliseconds, or a date in either of the two usual forms."""
    text = (
        str(value).strip()[:200]
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else ""
    )
    for part in (
        text,
        text.partition(",")[0].strip(),
    ):  # equal fields may have been joined: "30, 30"
        if re.fullmatch(r"[0-9]{1,14}(?:\.[0-9]{1,20})?", part):
            seconds = float(part) * unit
            seconds = seconds / 1000 if seconds > 1e11 else seconds
            return seconds - now() if seconds > 1e9 else seconds
        if re.fullmatch(r"(?:[0-9]{1,14}(?:\.[0-9]{1,20})?(?:ms|[smhd])){1,8}", part):
            return parse_duration(part)
        moment = _timestamp(part)
        if moment is not None:
            return moment - now()
    return None


def _timestamp(text: str) -> Optional[float]:
    """A date of HTTP or of ISO 8601 as seconds since 1970; None for what is none, however absurd."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    iso = re.sub(
        r"\.([0-9]{1,6})[0-9]{0,20}",
        lambda match: "." + match[1].ljust(6, "0"),
        text.replace("Z", "+00:00"),
    )
    for parse, value in ((parsedate_to_datetime, text), (datetime.fromisoformat, iso)):
        try:
            moment = parse(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError, AttributeError, OSError):
            continue
    return None


def _wait_from_headers(headers: Dict[str, str], now: Callable[[], float]) -> Optional[float]:
    """The longest wait of the fields that tell when a limit which is used up begins anew."""
    delays = []
    for name, value in headers.items():
        if name in (
            "ratelimit",
            "x-ratelimit",
        ):  # "default";r=0;t=60, or limit=9, remaining=0, reset=60
            remaining, wait = (
                re.search(rf"\b{word}=([0-9]{{1,9}})\b", value[:1000])
                for word in ("(?:r|remaining)", "(?:t|reset)")
            )
            delays += [float(wait[1])] if wait and (not remaining or remaining[1] == "0") else []
        elif "reset" in name.split("-") and re.search(r"rate-?limit|tokenlimit", name):
            remaining = headers.get(name.replace("reset", "remaining"), "0").strip()
            delays += (
                [_wait(value, 1.0, now)] if re.fullmatch(r"0(?:\.0{1,9})?|", remaining) else []
            )
    return max((seconds for seconds in delays if seconds is not None), default=None)


# Fields of error bodies, in small letters and without "_", and what one of their units is in seconds.
WAIT_FIELDS = {
    "retrydelay": 1.0,
    "retryafter": 1.0,
    "retryafterseconds": 1.0,
    "retryafterms": 0.001,
    "resettime": 1.0,
    "resetat": 1.0,
    "resetsat": 1.0,
    "resetsinseconds": 1.0,
}


def _wait_from_body(value: Any, now: Callable[[], float], depth: int = 5) -> Optional[float]:
    """The wait that a body tells in one of WAIT_FIELDS, or in header fields that it quotes."""
    if not depth or not isinstance(value, (dict, list)):
        return None
    if isinstance(value, list):
        return next(
            filter(None, (_wait_from_body(item, now, depth - 1) for item in value[:16])), None
        )
    for name, inner in itertools.islice(value.items(), 64):
        unit = WAIT_FIELDS.get(name.replace("_", "").lower())
        if name == "headers" and isinstance(inner, dict):
            seconds = retry_after_seconds(
                {key.lower(): str(item) for key, item in itertools.islice(inner.items(), 64)},
                {},
                now,
            )
        else:
            seconds = _wait(inner, unit, now) if unit else _wait_from_body(inner, now, depth - 1)
        if seconds is not None:
            return seconds
    return None


_WAIT_IN_WORDS = re.compile(
    r"(?:(?:try|retry|again)[a-z ]{0,30} (?:in|after)|wait(?: for)?|resets? in) (?:about )?"
    r"((?:[0-9]{1,9}(?:\.[0-9]{1,20})? ?(?:[a-z]{1,12})?(?:,? and |, | )?){1,4})",
    re.I,
)


def _wait_in_words(message: str) -> Optional[float]:
    """The seconds of "try again in 7m30.5s" or "Please retry after 2 minutes"."""
    spoken = _WAIT_IN_WORDS.search(message[:4000])
    if not spoken:
        return None
    total = 0.0
    for count, unit in re.findall(
        r"([0-9]{1,9}(?:\.[0-9]{1,20})?) ?([a-z]{0,12})", spoken[1].lower()
    ):
        factor = next(
            (seconds for names, seconds in DURATION_UNITS if re.fullmatch(names, unit)), None
        )
        if factor is None:
            break
        total += float(count) * factor
    return total or None


DURATION_UNITS = (
    ("|s|secs?|seconds?", 1.0),
    ("ms|millis|milliseconds?", 0.001),
    ("m|mins?|minutes?", 60.0),
    ("h|hrs?|hours?", 3600.0),
    ("d|days?", 86400.0),
)


def parse_duration(text: str) -> Optional[float]:
    """The seconds of "17", "1m30.5s", "6h" or "120ms" (OpenAI's x-ratelimit-reset-*)."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    if not re.fullmatch(
        r"(?:[0-9]{1,14}(?:\.[0-9]+)?(?:ms|[smhd]|\Z))+", text
    ):  # only the last may lack its unit:
        return None  # if any could, a row of digits could be split in 2 to the power of its length ways
    return sum(
        float(count) * units[unit] for count, unit in re.findall(r"([0-9.]+)(ms|[smhd]?)", text)
    )


class SingleFlight:
    """One does the work while the others wait for it, and all of them share how it ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.failure: Optional[APIError] = None
        self.failed_at = -math.inf

    def run(self, work: Callable[[], None], scope: CancelScope) -> None:
        """Do the work; who came while somebody else failed at it gets that failure. Ends early with the watch."""
        arrived_at = time.monotonic()
        while not self.lock.acquire(timeout=0.25):
            scope.raise_if_cancelled()
        try:
            if self.failure is not None and self.failed_at >= arrived_at:
                raise self.failure
            work()
        except APIError as error:
            if error is not self.failure:
                self.failure, self.failed_at = error, time.monotonic()
            raise
        finally:
            self.lock.release()


class StaleOnErrorCache:
    """A value that is fetched anew after a while; meanwhile, and if that fails, the last good one serves on."""

    RETRY = 15.0  # seconds until a failed fetch is tried again

    def __init__(
        self, fetch: Callable[[], Any], ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.fetch, self.ttl, self.clock = fetch, ttl, clock
        self.single_flight = SingleFlight()
        self.value: Any = None
        self.failure: Optional[APIError] = None
        self.expires_at = -math.inf

    def get(self) -> Any:
        if self.value is None and self.failure and self.clock() < self.expires_at:
            raise self.failure
        if (
            self.value is None
            or self.clock() >= self.expires_at
            and not self.single_flight.lock.locked()
        ):
            self.single_flight.run(self._refresh, CancelScope())
        return self.value

    def _refresh(self) -> None:
        if self.value is not None and self.clock() < self.expires_at:
            return
        try:
            self.value = self.fetch()
            self.expires_at = self.clock() + self.ttl
        except APIError as error:
            self.expires_at, self.failure = self.clock() + self.RETRY, error
            if self.value is None:
                raise
            log.warning("the last known models serve on: %s", error.message)


class ChatDecoder:
    """The stream of any OpenAI-style upstream.

        : keep-alive                                            skipped, as are event:, id: and retry:
        data: {"choices":[{"delta":{"content":"Hi"}}]}          Text
        data: {"choices":[{"delta":{"reasoning_content":"h"}}]} Reasoning ("reasoning" with some servers)
        data: {"choices":[{"delta":{"tool_calls":[...]}}]}      ToolCall fragments
        data: {"choices":[{"delta":{},"finish_reason":"stop"}]} the end, held until the usage has come
        data: {"choices":[],"usage":{...}}                      usage, before or after it
        data: {"error":{"message":"..."}}                       an error
        data: [DONE]                                            Finish; some servers never send it

    Lines end with CR LF or LF, and an event may have several data lines. Only the first choice counts.
    """

    LINE_LIMIT = 16 << 20

    def __init__(self, upstream_name: str = "the upstream", secrets: Iterable[str] = ()) -> None:
        self.upstream_name, self.secrets = upstream_name, secrets
        self.buffer = bytearray()  # a line that has not ended
        self.calls: set = set()  # (index, id) of each call of a tool
        self.latest: Dict[
            int, int
        ] = {}  # by that index: which of the calls was the last to come with it
        self.data: List[bytes] = []  # the data lines of an event that has not ended,
        self.size = 0  # and what they take in memory
        self.reason: Optional[str] = None
        self.usage: Optional[Dict[str, int]] = None
        self.finished = False
        self.error: Optional[APIError] = None

    def feed(self, data: bytes) -> List[Event]:
        if self.buffer:
            data = take_complete_lines(self.buffer, data)
        lines = data.split(b"\n")
        rest = lines.pop()
        if rest:
            self.buffer += rest
        if b"\r" in data:
            lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
        out: List[Event] = []
        for line in lines:
            if line.startswith(b"data:"):
                self.data.append(line[5:].lstrip(b" "))
                self.size += len(line) + 64
            elif not line and self.data:
                self._event(b"\n".join(self.data), out)
                self.data, self.size = [], 0
            if self.finished or self.error:
                self.buffer.clear()
                return out
        if (self.data or self.buffer) and self.size + len(self.buffer) > self.LINE_LIMIT:
            self.error = truncated(self.upstream_name, "sent an event without an end")
        return out

    def close(self) -> List[Event]:
        out: List[Event] = []
        if self.data and not self.buffer.strip():
            self._event(b"\n".join(self.data), out)  # the last event's blank line may be missing
        if not self.finished and not self.error:
            self._finish(out)
        return out

    def _event(self, data: bytes, out: List[Event]) -> None:
        if data.strip() == b"[DONE]":
            return self._finish(out)
        event = json_or_none(data)
        if not isinstance(event, dict):
            self.error = truncated(self.upstream_name, "sent an event that is not JSON")
        elif event.get("error") or is_error(event):
            self.error = error_from_body(self.upstream_name, 200, event, self.secrets)
        else:
            self.usage = chat_usage(event.get("usage")) or self.usage
            for choice in as_list(event.get("choices")):
                choice = as_dict(choice)
                if not choice.get("index"):
                    out += map(
                        self._renumber_tool_call,
                        message_events(
                            as_dict(choice.get("delta")) or {"content": choice.get("text")}
                        ),
                    )
                    reason = choice.get("finish_reason")
                    self.reason = reason if reason and isinstance(reason, str) else self.reason

    def _renumber_tool_call(self, event: Event) -> Event:
        """Some servers give every call of a tool the index 0: a new id is a new call. Others give no id."""
        if not isinstance(event, ToolCall):
            return event
        if event.index not in self.latest or event.id and (event.index, event.id) not in self.calls:
            if len(self.calls) == MAX_TOOL_CALLS:
                self.error = too_many_calls(self.upstream_name)
                return event
            self.latest[event.index] = len(self.calls)
            self.calls.add((event.index, event.id))
        return ToolCall(self.latest[event.index], event.arguments, event.id, event.name)

    def _finish(self, out: List[Event]) -> None:
        if self.reason is None:
            self.error = truncated(self.upstream_name)
        else:
            self.finished = True
            out.append(Finish(self.reason, self.usage))


def message_events(message: Dict[str, Any]) -> List[Event]:
    """The events of a delta of a stream, or of a whole message."""
    events: List[Event] = []
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought:
        events.append(Reasoning(thought))
    text = message.get("content") or message.get("refusal")
    if isinstance(text, list):
        text = "".join(str(as_dict(part).get("text") or "") for part in text)
    if isinstance(text, str) and text:
        events.append(Text(text))
    calls = as_list(message.get("tool_calls"))
    if isinstance(message.get("function_call"), dict):
        calls = [{"index": 0, "function": message["function_call"]}]
    for at, call in enumerate(map(as_dict, calls)):
        function, index = as_dict(call.get("function")), call.get("index")
        arguments = function.get("arguments") or ""
        events.append(
            ToolCall(
                at if count_or_none(index) is None or index >= 1 << 31 else index,
                arguments if isinstance(arguments, str) else _encode(arguments),
                name_or_none(call.get("id")),
                name_or_none(function.get("name")),
            )
        )
    return events


def name_or_none(value: Any) -> Optional[str]:
    """A string as it is, a number as a string, and None for anything else."""
    return value if isinstance(value, str) else str(value) if type(value) is int else None


def chat_usage(usage: Any) -> Optional[Dict[str, Any]]:
    """The usage of an OpenAI-style upstream, if it has both counts; what else it tells stays, except for impossible counts."""
    usage = {
        name: counts(value) if isinstance(value, dict) else value
        for name, value in counts(as_dict(usage)).items()
    }
    prompt, completion = (
        count_or_none(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")
    )
    if prompt is None or completion is None:
        return None
    total = count_or_none(usage.get("total_tokens"))
    return {**usage, "total_tokens": prompt + completion if total is None else total}


def counts(usage: Dict[str, Any]) -> Dict[str, Any]:
    """An object without the integers that can't be counts."""
    return {
        name: value
        for name, value in usage.items()
        if type(value) is not int or 0 <= value < 1 << 53
    }


class PassthroughDecoder:
    """A stream in the client's own format, passed on byte for byte; only its first event and its end are looked at.

    Comments before the first event are held back: until then another controller may still answer.
    Whole lines are passed on, so that an error can follow where the upstream breaks off. ``end_pattern`` is
    what a complete stream has in it (END_PATTERNS); without it its HTTP message's end is enough.
    """

    MAX_HELD = 16 << 20
    stopped = False

    def __init__(
        self,
        upstream_name: str,
        is_sse: bool = True,
        end_pattern: Optional[Any] = None,
        secrets: Iterable[str] = (),
    ) -> None:
        self.upstream_name, self.is_sse, self.end_pattern, self.secrets = (
            upstream_name,
            is_sse,
            end_pattern,
            secrets,
        )
        self.first_event_seen = (
            self.started
        ) = not is_sse  # other bytes than events are not looked at
        self.complete = False  # the stream has said so itself
        self.buffer = bytearray()  # a line that is not whole
        self.comments = bytearray()  # those before the first event
        self.tail = b"\n\n"
        self.error: Optional[APIError] = None

    def feed(self, data: bytes) -> List[Event]:
        if not self.is_sse or self.fast_path(data):
            return [RawBytes(data)]
        if self.buffer or not data.endswith(b"\n"):
            data = take_complete_lines(self.buffer, data)
        if not self.first_event_seen:
            data = self._first(data)
        if b'"error' in data:
            data = redact_bytes(data, self.secrets)
        if len(self.buffer) + len(self.comments) > self.MAX_HELD:
            self.error = truncated(
                self.upstream_name, "sent a line without an end, or comments alone"
            )
        if not data:
            return []
        data = self._find_end(data)
        self.started = (
            self.started
            or self.complete
            or any(has_content(line[1]) for line in DATA_LINE.finditer(data))
        )
        self.tail = data if len(data) > 3 else (self.tail + data)[-4:]
        return [RawBytes(data)]

    def fast_path(self, data: bytes) -> bytes:
        """The data, if it is nothing but events of one line from the middle of a chat; else b""."""
        if (
            self.started
            and not self.buffer
            and data.endswith(MID_STREAM_SUFFIXES)
            and b'"error' not in data
            and (
                data.find(b"\n") == len(data) - 2
                or any(data.count(b"\n") == 2 * data.count(end) for end in MID_STREAM_SUFFIXES)
            )
        ):  # each line break is of such an end
            self.tail = data
            return data
        return b""

    def _find_end(self, data: bytes) -> bytes:
        """The data, up to the end of the stream if that is in it."""
        last = data.rfind(b"[DONE]")
        if self.end_pattern is not None:
            at = max(last, *map(data.rfind, END_HINTS[self.end_pattern]))
            if at >= 0 and (
                self.end_pattern.search(data, max(0, at - 8)) or self.end_pattern.search(data)
            ):
                self.end_pattern = None
        done = DONE.search(data, max(0, data.find(b"[DONE]") - 8)) if last >= 0 else None
        if done is None or self.complete:
            return data
        self.complete, self.end_pattern = True, None
        return data[: done.end()] + (
            b"\r\n" if done[0].endswith(b"\r\n") else b"\n"
        )  # its blank line may come later

    def _first(self, data: bytes) -> bytes:
        """Wait for the first event; if it is an error, the answer has not begun."""
        event = DATA.search(data)  # the lines before these had none
        if event is None:
            self.comments += data
            return b""
        with contextlib.suppress(ValueError):
            fields = as_dict(from_json(event[1]))
            if is_error(fields):
                self.error = error_from_body(self.upstream_name, 200, fields, self.secrets)
                return b""
        self.first_event_seen = True
        comments, self.comments = bytes(self.comments), bytearray()
        return comments + data

    def close(self) -> List[Event]:
        data, self.buffer, self.comments = (
            bytes(self.comments + self.buffer),
            bytearray(),
            bytearray(),
        )
        if self.end_pattern is not None and not self.end_pattern.search(data):
            self.error = truncated(self.upstream_name)
            return self.flush()
        return [RawBytes(data)] if data else []

    def flush(self) -> List[Event]:
        """It broke off: half a line is dropped, and half an event is ended, so that an error can follow."""
        self.buffer.clear()
        return (
            [RawBytes(b"\n")]
            if self.is_sse
            and self.first_event_seen
            and not self.tail.endswith((b"\n\n", b"\n\r\n"))
            else []
        )


DATA = re.compile(rb"(?:^|\n)data:([^\n]*)\n")
DATA_LINE = re.compile(rb"^data:([^\n]*)\n", re.M)
DONE = re.compile(rb"^data: ?\[DONE\][ \r]*\n", re.M)
OPENING = re.compile(
    r"ping|message_start|content_block_start|response\.(created|queued|in_progress|\w+\.added)"
)
MID_STREAM_SUFFIXES = (
    b'"finish_reason":null}]}\n\n',
    b'"finish_reason": null}]}\n\n',
    b'"finish_reason":null}],"usage":null}\n\n',
)
CHAT_ENDS = re.compile(rb'^data: ?\[DONE\][ \r]*$|"finish_reason" ?: ?"[a-z]', re.M)
END_PATTERNS = {
    CHAT_PATH: CHAT_ENDS,
    "/v1/completions": CHAT_ENDS,
    "/v1/messages": re.compile(rb'"type" ?: ?"(?:message_stop|error)"'),
    "/v1/responses": re.compile(rb'"type" ?: ?"response\.(?:completed|incomplete|failed)"'),
}
END_HINTS = {
    CHAT_ENDS: (b'"finish_reason":"', b'"finish_reason": "', b'"finish_reason" :'),
    END_PATTERNS["/v1/messages"]: (b"message_stop", b"error"),  # found faster, backwards
    END_PATTERNS["/v1/responses"]: (
        b"response.completed",
        b"response.incomplete",
        b"response.failed",
    ),
}


def has_content(data: bytes) -> bool:
    """Whether an event of a stream has more than its opening: text, reasoning, a call of a tool, an error, an end."""
    event = json_or_none(data)
    if not isinstance(event, dict):
        return bool(data.strip())
    if isinstance(event.get("type"), str):
        return not OPENING.fullmatch(event["type"])
    choices = event.get("choices")
    if event.get("error") or not isinstance(choices, list):
        return True
    parts = [
        {**choice, **as_dict(choice.get("delta")), "delta": None, "role": None, "index": None}
        for choice in map(as_dict, choices)
    ]
    return any(any(part.values()) for part in parts)


def truncated(upstream_name: str, problem: str = "ended its answer early") -> APIError:
    """An answer that is not whole."""
    return APIError(502, f"{upstream_name} {problem}.", code="upstream_error", category="network")


def is_error(body: Any) -> bool:
    """Is a body that came with status 200 an error, and no answer?"""
    body = as_dict(body[0] if isinstance(body, list) and body else body)
    return bool(
        body.get("error") or body.get("errors") or "error" in (body.get("object"), body.get("type"))
    ) and not (
        body.get("object") == "response"
        or any(body.get(name) for name in ("choices", "data", "output", "content"))
    )


class OpenAIController(Controller):
    """Anything that speaks OpenAI's API: relayed as it is, or translated for clients that speak another."""

    NOT_NATIVE_BY_DEFAULT = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses")

    def __init__(self, options: ControllerSettings, settings: Settings) -> None:
        super().__init__(options, settings)
        headers = {
            "User-Agent": settings.user_agent,
            "Accept-Encoding": "identity",
            **options.headers,
        }
        if options.api_key:
            headers["Authorization"] = f"Bearer {options.api_key}"
        self.secrets = [options.api_key, *option_secrets(options)]
        base = (
            options.base_url
            if urllib.parse.urlsplit(options.base_url).path
            else options.base_url + "/v1"
        )
        self.transport = Transport(options, settings, base, self.name, headers)
        self.model_cache = StaleOnErrorCache(self._fetch_models, settings.models_ttl)

    def speaks(self, path: str) -> bool:
        """Does it speak the format of this path itself?"""
        if self.options.paths:
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.options.paths)
        return path not in self.NOT_NATIVE_BY_DEFAULT

    def check_support(self, call: Call) -> Optional[APIError]:
        if self.speaks(call.path):
            return None
        if call.relay_only or call.image_count:
            return APIError(404, f"{self.name} does not offer {call.path}.", code="not_found")
        return call.translation_error

    def events(self, call: Call) -> Iterable[Event]:
        is_native = self.speaks(call.path)
        path = (call.path + call.query if is_native else CHAT_PATH)[len("/v1") :]
        data, content_type = self._request(call, is_native)
        response = self.transport.start_request(
            "POST",
            path,
            call.scope,
            data,
            {**call.headers, "Content-Type": content_type},
            force_new_connection=call.retry_reason,
        )
        return EventStream(response, lambda response: self._decoder(call, response, is_native))

    def models(self) -> List[Dict[str, Any]]:
        return self.model_cache.get()

    def _request(self, call: Call, is_native: bool) -> Tuple[bytes, str]:
        """The request's bytes, unparsed where nothing changes, and its type."""
        name, body = (
            self.options.model_map.get(call.model, call.model),
            call.original_body if is_native else call.body,
        )
        dropped = [field for field in self.options.drop if body and body.get(field) is not None]
        if is_native and (
            not body or name == call.model and not dropped and call.raw_body.count(b'"model"') < 2
        ):
            return call.raw_body, call.content_type
        body = {field: value for field, value in body.items() if field not in self.options.drop}
        if not is_native and call.stream:
            body["stream_options"] = {"include_usage": True}
        if "model" in body:
            body["model"] = name
        call.ignored_params = dropped
        return request_json(body, len(call.raw_body)), "application/json"

    def _decoder(self, call: Call, response: UpstreamResponse, is_native: bool) -> Any:
        """What understands the body of an answer."""
        if not 200 <= response.status < 300:
            return BufferedBody(
                lambda data: self._status_error(response, data, call.model), is_error_body=True
            )
        content_type = response.headers.get("content-type", "")
        streamed = content_type.startswith("text/event-stream")
        if is_native and (call.relay_only or streamed == call.stream):
            return self._relay(call, response, content_type, streamed)
        return (
            DecoderChain(ChatDecoder(self.name, self.secrets))
            if streamed
            else BufferedBody(self._completion)
        )

    def _relay(
        self, call: Call, response: UpstreamResponse, content_type: str, streamed: bool
    ) -> Any:
        call.relay_content_type, call.relay_status = (
            redact(content_type, self.secrets) or "application/octet-stream",
            response.status,
        )
        if streamed:
            return PassthroughDecoder(self.name, True, END_PATTERNS.get(call.path), self.secrets)
        if content_type.startswith("text/html"):
            raise APIError(502, f"{self.name} answered with a web page.", code="upstream_error")
        if not content_type.startswith("application/json") and (
            response.body.until_close or not response.body.done
        ):
            return PassthroughDecoder(self.name, is_sse=False)
        return BufferedBody(
            functools.partial(self._document, content_type, response.body.until_close)
        )

    def _document(self, content_type: str, until_close: bool, data: bytes) -> List[Event]:
        """A whole body that is relayed; as JSON it must look like that, and not be an error.

        Where the end of the connection is the end of the body, only its JSON shows that nothing is missing.
        """
        text = data.strip() if content_type.startswith("application/json") else b""
        if until_close and json_or_none(text) is None:
            raise truncated(self.name)
        if text and (text[:1] not in b"{[" or text[-1:] not in b"}]"):
            raise truncated(self.name, "sent something that is not JSON")
        if (
            b'"error"' in text
            or b'"errors"' in text
            or b'"choices"' not in text
            and b'"data"' not in text
        ):
            body = json_or_none(data)
            if is_error(body) or body is None and text[1:].lstrip().startswith(b'"error"'):
                raise error_from_body(self.name, 200, data if body is None else body, self.secrets)
            data = redact_bytes(data, self.secrets)
        return [RawBytes(data)]

    def _completion(self, data: bytes) -> List[Event]:
        """The events of an answer that is not streamed."""
        body = json_or_none(data)
        fields = as_dict(body)
        if fields.get("error") or is_error(body):
            raise error_from_body(self.name, 200, body, self.secrets)
        choice = as_dict(next(iter(as_list(fields.get("choices"))), None))
        if not isinstance(choice.get("finish_reason"), str):
            raise truncated(self.name, "sent something that is no completion")
        return [
            *message_events(as_dict(choice.get("message")) or {"content": choice.get("text")}),
            Finish(choice["finish_reason"], chat_usage(fields.get("usage"))),
        ]

    def _status_error(self, response: UpstreamResponse, data: bytes, model: str) -> NoReturn:
        body = json_or_none(data)
        raise error_from_body(
            self.name,
            response.status,
            data if body is None else body,
            self.secrets,
            response.headers,
            (model, self.options.model_map.get(model, model)),
        )

    def _fetch_models(self) -> List[Dict[str, Any]]:
        response = self.transport.fetch(
            "GET", "/models", CancelScope(), first_byte=self.settings.session_timeout
        )
        body = json_or_none(response.read(limit=MAX_LIST_BYTES))
        if response.status != 200:
            raise error_from_body(self.name, response.status, body, self.secrets, response.headers)
        models = as_list(body.get("data") if isinstance(body, dict) else body)
        entries = bounded_model_list(
            self.name, ((entry.get("id"), entry) for entry in map(as_dict, models))
        ).values()
        if not entries:
            raise APIError(503, f"{self.name} lists no models.", code="upstream_error")
        return [
            {
                "object": "model",
                "owned_by": self.name,
                **entry,
                "created": count_or_none(entry.get("created")) or 0,
            }
            for entry in entries
        ]


class EchoController(Controller):
    """Answers with what it was asked, at a chosen speed: for trying a client without a network or a bill."""

    WORDS = 10_000  # that come one by one; the last one holds all that is left

    def check_support(self, call: Call) -> Optional[APIError]:
        if call.relay_only or call.image_count or call.translation_error:
            return call.translation_error or APIError(
                404, f"{self.name} only chats.", code="not_found"
            )
        return None

    def events(self, call: Call) -> Iterator[Event]:
        content = as_dict(call.body["messages"][-1]).get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        text = "".join(str(as_dict(part).get("text") or "") for part in parts)
        ends = [
            word.end() for word in itertools.islice(re.finditer(r"(?<!\s)\s*\S+", text), self.WORDS)
        ]
        if len(ends) in (0, self.WORDS):
            ends[-1:] = [len(text)]
        for begin, end in zip([0, *ends], ends):
            if self.options.speed:
                call.sleep(1 / self.options.speed)
            yield Text(text[begin:end])
        yield Finish(
            "stop",
            {
                "prompt_tokens": len(ends),
                "completion_tokens": len(ends),
                "total_tokens": 2 * len(ends),
            },
        )

    def models(self) -> List[Dict[str, Any]]:
        return [{"id": "echo", "object": "model", "created": 0, "owned_by": self.name}]


CONTROLLERS: Dict[str, Callable[[ControllerSettings, Settings], Controller]] = {
    "openai": OpenAIController,
    "akash": AkashController,
    "echo": EchoController,
}


# == 8. pool ==================================================================================
# Who answers a request, and who is asked when that one can't. Knows neither sockets nor wires.

# What follows from an error's kind: may another controller answer, and does this one rest?
#   kind: (the next one is asked, rests after so many failures in a row)
FAILURE_POLICY: Dict[str, Tuple[bool, Optional[int]]] = {
    "request": (False, None),  # every upstream would say so
    "ability": (True, None),  # it can't do that at all
    "model": (True, None),  # it does not know the model
    "refused": (
        True,
        None,
    ),  # it does not do this request: its model, its words, its size; others are served on
    "limit": (True, 1),  # for as long as it said
    "auth": (True, 1),  # our key is at fault: long
    "network": (True, 1),  # refused, silent, cut: growing, always ending
    "again": (True, None),  # it is asked once more itself: a session or a kept connection had ended
    "server": (True, 3),  # a 5xx: only if it goes on
    "local": (False, None),  # this machine is out of descriptors, memory or threads
}
AUTH_COOLDOWN, BACKOFF_BASE, BACKOFF_MAX = 600.0, 1.0, 60.0  # seconds
BACKOFF_CATEGORIES = (
    "auth",
    "network",
    "server",
)  # kinds of failure that are answered by a guess, not by a time that the upstream told
CATEGORY_RANK = (
    "ability",
    "model",
    "auth",
    "refused",
    "server",
    "network",
    "limit",
)  # of several errors the last one says most
KEY_TRUST = 300.0  # seconds for which a success shows that a key is good, whatever one refusal says
RECHECK = (
    600.0  # seconds of a cool-down after which one request finds out whether it has ended early
)
MAX_MODEL_COOLDOWNS = 256  # of single models at a controller

# What /status says of a failure, by its code or its kind: never an upstream's words, which may quote another client's.
REASONS = {
    "timeout": "no answer in time",
    "limit": "rate limit",
    "auth": "the upstream refuses the key",
    "network": "connection failed or broke off",
    "server": "server error",
    "image_failed": "the image failed",
}


class CoolDown:
    """Consecutive failures of one kind, and the time until which they keep a controller from being used."""

    def __init__(self, until: float = 0.0) -> None:
        self.until = until
        self.failures, self.failed_at = 0, -math.inf
        self.recheck_at = math.inf

    def record_failure(
        self, now: float, started: float, after: int, seconds: Optional[float]
    ) -> None:
        """Count a failure. Concurrent ones count once; a cool-down is only ever extended, and its back-off doubles."""
        if started >= self.failed_at:
            self.failed_at = now
            self.failures += 1
        if self.failures >= after:
            back_off = min(BACKOFF_BASE * 2 ** min(self.failures - after, 16), BACKOFF_MAX)
            self.until = max(self.until, now + (seconds or back_off))
            self.recheck_at = now + RECHECK


class Upstream:
    """A controller's place in the pool, and how it fares. Its numbers change under the pool's lock only."""

    def __init__(self, controller: Controller, previous: Optional["Upstream"] = None) -> None:
        self.controller, self.options, self.name = controller, controller.options, controller.name
        self.current_weight = 0.0  # of smooth weighted round robin
        self.in_flight = self.served = self.failed = self.cooldown_count = 0
        self.cooldowns: Dict[
            Tuple[str, Optional[str]], CoolDown
        ] = {}  # by (kind, model); None: the whole controller
        self.served_at = -math.inf  # the last success
        self.last_error, self.last_error_at = "", 0.0  # the latter by time.time()
        self.logged_exceptions: set = (
            set()
        )  # (type, file, line) of the exceptions whose traceback is in the log
        self.known_models: Optional[frozenset] = None  # what its model list had, once it was read
        self.identity = self._identity()
        inherited = (
            ["served", "failed", "cooldown_count", "known_models"]
            if previous and previous.identity[:3] == self.identity[:3]
            else []
        )
        if previous and previous.identity == self.identity:
            inherited += ["cooldowns", "served_at", "last_error", "last_error_at"]
        for name in inherited:
            setattr(self, name, getattr(previous, name))

    def _identity(self) -> Tuple[Any, ...]:
        """How it reaches its upstream, and as whom. Cool-downs say nothing of another way."""
        options, settings = self.options, self.controller.settings
        cookie = settings.akash_cookie if options.type == "akash" else ""
        return (
            options.type,
            options.base_url,
            options.api_key,
            options.proxy,
            tuple(sorted(options.headers.items())),
            cookie,
            settings.user_agent,
            settings.ca_file,
        )

    def serves(self, model: str) -> Optional[bool]:
        """Is a model one of its own? None: not that we know, but it may be tried."""
        if model in self.options.model_map or not model:
            return True
        if self.options.models:
            return model_allowed(self.options.models, model)
        return True if self.known_models is None or model in self.known_models else None

    def has_capacity(self) -> bool:
        return not self.options.max_concurrency or self.in_flight < self.options.max_concurrency

    def record_result(
        self, error: Optional[APIError], now: float, started: float, model: str = ""
    ) -> None:
        """Record the result of an attempt, which began at ``started``.

        A success ends the cool-downs that were there when its attempt began. A refused key is cooled
        down at once only if it has served no request for KEY_TRUST seconds, else when a second
        attempt in a row is refused: one client's request could have been the reason.
        """
        if error is None:
            self.served += 1
            self.served_at = now
            self._recover(model, started)
            return
        category = "limit" if error.category == "server" and error.retry_after else error.category
        after = FAILURE_POLICY.get(category, FAILURE_POLICY["server"])[1]
        if after is None:
            return
        self.failed += 1
        self.last_error_at = time.time()
        self.last_error = (
            f"{error.status} {REASONS.get(error.code or '') or REASONS.get(category, category)}"
        )
        if category == "auth" and now - self.served_at < KEY_TRUST:
            after = 2
        was_cooling_down = self.cooldown_until > now
        seconds = {"auth": AUTH_COOLDOWN, "limit": error.retry_after}.get(category)
        self._cooldown(category, model if error.cooldown_scope == "model" else None).record_failure(
            now, started, after, seconds
        )
        self.cooldown_count += not was_cooling_down and self.cooldown_until > now

    def _recover(self, model: str, started: float) -> None:
        for category, scope in list(self.cooldowns):
            if (
                scope in (None, self._model(model))
                and self.cooldowns[category, scope].failed_at <= started
            ):
                del self.cooldowns[category, scope]

    def _cooldown(self, category: str, model: Optional[str]) -> CoolDown:
        """The one of a kind and of a model, or of all (None). The number of models is bounded: clients name them."""
        key = category, None if model is None else self._model(model)
        if key not in self.cooldowns:
            of_models = [key for key in self.cooldowns if key[1] is not None]
            if key[1] is not None and len(of_models) >= MAX_MODEL_COOLDOWNS:
                del self.cooldowns[min(of_models, key=lambda other: self.cooldowns[other].until)]
            self.cooldowns[key] = CoolDown()
        return self.cooldowns[key]

    def _model(self, model: str) -> str:
        """The upstream's name of a model, cut to what is remembered."""
        return self.options.model_map.get(model, model)[:MAX_NAME]

    @property
    def cooldown_until(self) -> float:
        """When the cool-downs of the whole controller are over."""
        return max(
            (cooldown.until for (_, model), cooldown in self.cooldowns.items() if model is None),
            default=0.0,
        )

    def available_at(self, model: str, ignored: Tuple[str, ...] = ()) -> float:
        """When it can be used for a model, as far as cool-downs go; those of some kinds may be ignored."""
        if not self.cooldowns:
            return 0.0
        scopes = (None, self._model(model))
        return max(
            (
                cooldown.until
                for (category, scope), cooldown in self.cooldowns.items()
                if scope in scopes and category not in ignored
            ),
            default=0.0,
        )

    def recheck(self, model: str, ignored: Tuple[str, ...], now: float) -> bool:
        """Whether to find out if a long cool-down has ended early; True once in RECHECK seconds.

        A limit could be that of one request only, or an account was topped up.
        """
        pending = [
            cooldown
            for (category, scope), cooldown in self.cooldowns.items()
            if scope in (None, self._model(model))
            and category not in ignored
            and cooldown.until > now
        ]
        if not pending or any(cooldown.recheck_at > now for cooldown in pending):
            return False
        for cooldown in pending:
            cooldown.recheck_at = now + RECHECK
        return True

    def log_exception(self, error: APIError) -> None:
        """Log the exception behind an error; its traceback only for the first one of a place in the code."""
        if error.bug is None:
            return
        trace: Any = error.bug.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        location = type(error.bug), trace.tb_frame.f_code.co_filename, trace.tb_lineno
        log.error(
            "%s: unexpected error: %s: %s",
            self.name,
            type(error.bug).__name__,
            str(error.bug)[:200],
            exc_info=None if location in self.logged_exceptions else error.bug,
        )
        self.logged_exceptions.add(location)

    def list_models(self) -> Tuple[List[Dict[str, Any]], Optional[frozenset], Optional[APIError]]:
        """The models it adds to the list, the names that its own list has, and the error if it tells none."""
        found, names, error = {}, self.known_models, None
        try:
            with controller_errors(self.name):
                models = self.controller.models()
                names = frozenset(model["id"] for model in models)
                patterns = self.options.models or ["*"]
                found = {
                    model["id"]: model
                    for model in models
                    if any(fnmatch.fnmatchcase(model["id"], pattern) for pattern in patterns)
                }
        except APIError as failure:
            error = failure
            self.log_exception(failure)
        named = [name for name in self.options.models if not re.search(r"[*?\[]", name)]
        for name in [*self.options.model_map, *named]:
            found.setdefault(
                name, {"id": name, "object": "model", "created": 0, "owned_by": self.name}
            )
        return list(found.values()), names, error


def model_allowed(patterns: Tuple[str, ...], model: str) -> bool:
    """May a model be used where only those of some patterns may? One that is not named could be any."""
    return (
        not patterns
        or model != ""
        and any(fnmatch.fnmatchcase(model, pattern) for pattern in patterns)
    )


class Waiter:
    """A call in the queue: the controllers that it can use, and until when it waits. The pool's lock guards it."""

    __slots__ = ("queue", "call", "candidates", "ignored", "deadline", "number", "line", "upstream")

    def __init__(
        self,
        queue: "CallQueue",
        call: Call,
        candidates: List[Upstream],
        ignored: Tuple[str, ...],
        deadline: float,
    ) -> None:
        self.queue, self.call, self.candidates, self.ignored, self.deadline = (
            queue,
            call,
            candidates,
            ignored,
            deadline,
        )
        self.number = next(queue.numbers)
        self.upstream: Optional[Upstream] = None  # the controller that it has been given
        by_model = any(
            model is not None for upstream in candidates for _, model in upstream.cooldowns
        )
        self.line = (
            call.model if by_model else None,
            ignored,
            *map(id, candidates),
        )  # of those that can go on when it can

    def available_at(self, now: float) -> float:
        return min(
            max(upstream.available_at(self.call.model, self.ignored), now)
            for upstream in self.candidates
        )

    def set(self) -> None:
        """The call was cancelled (this is its ``bell``)."""
        with self.queue.lock:
            self.queue.wake(self)


class CallQueue:
    """Calls that wait for a controller, first come, first served, without a thread. Called under the pool's lock.

    There is a line for each set of controllers (and model, if it matters), so that only the first of each is
    looked at: to wake all, or to look through all, would cost the square of their number.
    """

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.numbers = itertools.count()
        self.lines: Dict[Tuple[Any, ...], OrderedDict] = {}

    def add(self, waiter: Waiter) -> None:
        self.lines.setdefault(waiter.line, OrderedDict())[waiter] = None

    def remove(self, waiter: Waiter) -> bool:
        """False if it has left the queue already."""
        line = self.lines.get(waiter.line, {})
        if waiter not in line:
            return False
        del line[waiter]
        if not line:
            del self.lines[waiter.line]
        return True

    def wake(self, waiter: Waiter, upstream: Optional[Upstream] = None) -> None:
        """Let a call go on, with a controller if there is one for it; only once."""
        if self.remove(waiter):
            waiter.upstream = upstream
            if upstream is not None:
                upstream.in_flight += 1
            waiter.call.wake()

    def in_order(self) -> List[OrderedDict]:
        """The lines, that of the call which has waited longest first."""
        return sorted(self.lines.values(), key=lambda line: next(iter(line)).number)


class Pool:
    """The controllers, and for each request the choice of one, then of the next."""

    def __init__(
        self,
        settings: Settings,
        previous: Optional["Pool"] = None,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.settings, self.clock, self.rng = settings, clock, rng
        self.lock = previous.lock if previous else threading.Lock()
        self.queue = previous.queue if previous else CallQueue(self.lock)
        known = {upstream.name: upstream for upstream in previous.upstreams} if previous else {}
        alike = (
            previous is not None
            and dataclasses.replace(
                settings, controllers=previous.settings.controllers, keys=previous.settings.keys
            )
            == previous.settings
        )
        self.upstreams = []
        for options in settings.pool():
            upstream = known.get(options.name)
            if upstream is None or not alike or upstream.options != options:
                upstream = Upstream(CONTROLLERS[options.type](options, settings), upstream)
            self.upstreams.append(upstream)
        self.choose = {
            "balanced": self.weighted_round_robin,
            "random": self.weighted_random,
            "least_busy": self.least_connections,
        }[settings.pool_type]
        self.refresh_at = self.model_names_refresh_at = -math.inf
        self.model_names: frozenset = (
            frozenset()
        )  # of the union of all lists, until model_names_refresh_at
        self._cached_candidates = functools.lru_cache(maxsize=256)(
            self._candidates
        )  # by the name of a model, until a list changes

    # -- who is asked

    def apply_alias(self, call: Call) -> None:
        """Put the name that is meant in place of another one."""
        name = self.resolve_alias(call.model)
        if name != call.model:
            call.model, call.body = name, {**call.body, "model": name}
            call.original_body = call.original_body and {**call.original_body, "model": name}
            call.raw_body = request_json(call.original_body, len(call.raw_body))

    def resolve_alias(self, model: str) -> str:
        """The model that a name means: by an alias, or with "--" for "/" if there is such a model only."""
        for pattern, meant in self.settings.model_aliases.items():
            if model and fnmatch.fnmatchcase(model, pattern):
                return meant
        if "--" in model:
            if self.clock() >= self.model_names_refresh_at:
                with contextlib.suppress(APIError):  # without a list it is taken as it is
                    self.models()
            meant = model.replace("--", "/")
            return meant if meant in self.model_names and model not in self.model_names else model
        return model

    def acquire(
        self, call: Call, tried: List[Upstream], errors: List[APIError], unsupported: int = 0
    ) -> Upstream:
        """The controller to ask next. APIError if there is none; Queued if the call has to wait for one.

        The first so many of those that are not asked any more can't do it at all.
        """
        self.refresh_models_async()
        with self.lock:
            waiter = self._resume(call)
            if waiter is not None and waiter.upstream is not None:
                return waiter.upstream
            known = self.candidates(call.model)
            if unsupported:
                known = [upstream for upstream in known if upstream not in tried[:unsupported]]
            candidates = (
                [upstream for upstream in known if upstream not in tried] if tried else known
            )
            # An only candidate skips back-off and obeys rate limits only, as in nginx.
            ignored = BACKOFF_CATEGORIES if len(known) == 1 else ()
            if not candidates:
                raise self.best_error(call, known, errors, ignored)
            now = self.clock()
            if self.queue.lines and any(
                upstream.has_capacity() for upstream in candidates
            ):  # those who wait go first
                self._wake_ready(now)
            upstream = self._pick(candidates, call.model, ignored, now)
            if upstream is None:
                deadline = now + self.settings.max_wait if waiter is None else waiter.deadline
                upstream = self._wait(
                    Waiter(self.queue, call, candidates, ignored, deadline), known, errors, now
                )
            upstream.in_flight += 1
            return upstream

    def _resume(self, call: Call) -> Optional[Waiter]:
        """What became of a call that has waited, if it has; raises why it was cancelled, if it was."""
        waiter = call.waiter
        if waiter is not None:
            if call.cancel_reason:
                raise call.cancel_reason  # close() gives back what the call was given
            call.waiter = call.wakeup = None
        return waiter

    def _pick(
        self, candidates: List[Upstream], model: str, ignored: Tuple[str, ...], now: float
    ) -> Optional[Upstream]:
        """The one to use now: available and with room, or with a cool-down so long that it is time to check it."""
        with_capacity = [upstream for upstream in candidates if upstream.has_capacity()]
        ready = [
            upstream for upstream in with_capacity if upstream.available_at(model, ignored) <= now
        ]
        if not ready:
            return next(
                (upstream for upstream in with_capacity if upstream.recheck(model, ignored, now)),
                None,
            )
        return self.choose(self.top_priority(ready)) if len(ready) > 1 else ready[0]

    def _wait(
        self, waiter: Waiter, known: List[Upstream], errors: List[APIError], now: float
    ) -> Upstream:
        """Put a call into the queue, or raise why that is useless.

        Before a call fails because all cool down, those whose key was refused are tried: either they
        serve it, so that no client's request has stopped the others, or the error tells what is wrong.
        """
        call = waiter.call
        available_at = waiter.available_at(now)
        if available_at > waiter.deadline or now >= waiter.deadline:
            upstream = self._pick(waiter.candidates, call.model, (*waiter.ignored, "auth"), now)
            if upstream is not None:
                return upstream
            earliest = min(
                max(upstream.available_at(call.model, waiter.ignored), now) for upstream in known
            )
            raise self.unavailable_error(
                waiter.candidates, call.model, errors, max(earliest - now, 1.0)
            )
        call.waiter = call.wakeup = waiter
        self.queue.add(waiter)
        if call.cancel_reason and self.queue.remove(
            waiter
        ):  # cancelled before it had a bell: no other thread wakes it
            raise call.cancel_reason
        raise Queued

    def _wake_ready(
        self, now: float, released: Optional[Upstream] = None, most: float = math.inf
    ) -> float:
        """Wake the calls that can go on, in their order, and only those; how many more might be woken.

        ``released``: only this controller may have become free, and no time has passed.
        """
        for line in self.queue.in_order():
            while line and most:
                waiter = next(iter(line))
                candidates = (
                    waiter.candidates
                    if released is None
                    else [released]
                    if released in waiter.candidates
                    else []
                )
                upstream = self._pick(candidates, waiter.call.model, waiter.ignored, now)
                if upstream is None and (
                    released or now < waiter.deadline >= waiter.available_at(now)
                ):
                    break
                self.queue.wake(waiter, upstream)
                most -= 1
            if released is not None and not released.has_capacity():
                break
        return most

    def wake_waiters(self, most: int) -> bool:
        """Wake so many of the calls that can go on, or have waited long enough; True if there may be more."""
        with self.lock:
            return bool(self.queue.lines) and not self._wake_ready(self.clock(), most=most)

    def leave_queue(self, call: Call) -> None:
        """The call is over, whether it still waits or has been given a controller meanwhile."""
        with self.lock:
            waiter, call.waiter, call.wakeup = call.waiter, None, None
            if waiter is not None and not self.queue.remove(waiter) and waiter.upstream is not None:
                waiter.upstream.in_flight -= 1
                self._wake_ready(self.clock(), waiter.upstream)

    def candidates(self, model: str) -> List[Upstream]:
        """Who may be asked for a model; names that are longer than any are not remembered."""
        return self._cached_candidates(model) if len(model) <= 256 else self._candidates(model)

    def _candidates(self, model: str) -> List[Upstream]:
        """Who may be asked for a model: who is known to have it, else who may be tried."""
        on = [upstream for upstream in self.upstreams if upstream.options.weight > 0]
        sure = [upstream for upstream in on if upstream.serves(model)]
        return sure or [upstream for upstream in on if upstream.serves(model) is None]

    def inability(self, upstream: Upstream, call: Call) -> Optional[APIError]:
        """Why a controller can't answer a request; None if it can."""
        try:
            with controller_errors(upstream.name):
                error = upstream.controller.check_support(call)
                if error:
                    error.category = "ability"  # what can't be done here, another controller may do
                return error
        except APIError as failure:
            upstream.log_exception(failure)
            with self.lock:
                upstream.record_result(failure, self.clock(), self.clock())
            return failure

    def release(
        self,
        upstream: Upstream,
        error: Optional[APIError],
        committed: bool,
        started: float,
        model: str = "",
    ) -> None:
        with self.lock:
            now = self.clock()
            upstream.in_flight -= 1
            if error is not None or committed:
                upstream.record_result(error, now, started, model)
            if self.queue.lines:
                self._wake_ready(now, upstream)

    def best_error(
        self, call: Call, known: List[Upstream], errors: List[APIError], ignored: Tuple[str, ...]
    ) -> APIError:
        """The error when nobody is left: the one that tells most."""
        if not errors:
            return model_not_found(call.model)
        error = max(
            errors,
            key=lambda error: (
                CATEGORY_RANK.index(error.category)
                if error.category in CATEGORY_RANK
                else CATEGORY_RANK.index("server")
            ),
        )
        if error.category == "limit":
            now = self.clock()
            delays = [upstream.available_at(call.model, ignored) - now for upstream in known]
            error.retry_after = max(
                1.0, min((seconds for seconds in delays if seconds > 0), default=1.0)
            )
        return error

    def unavailable_error(
        self, candidates: List[Upstream], model: str, errors: List[APIError], seconds: float
    ) -> APIError:
        """The error when all are cooling down or full, and none will be back soon."""
        limit = any(error.category == "limit" for error in errors) or all(
            upstream.available_at(model, BACKOFF_CATEGORIES) > self.clock()
            for upstream in candidates
            if upstream.available_at(model) > self.clock()
        )
        return APIError(
            429 if limit else 503,
            "All controllers for this model are cooling down or busy.",
            code="rate_limit_exceeded" if limit else "upstream_error",
            retry_after=seconds,
        )

    # -- the choice among those of one tier; called under the lock

    @staticmethod
    def top_priority(ready: List[Upstream]) -> List[Upstream]:
        first = min(upstream.options.priority for upstream in ready)
        return [upstream for upstream in ready if upstream.options.priority == first]

    def weighted_round_robin(self, ready: List[Upstream]) -> Upstream:
        """Smooth weighted round robin: 5:1:1 gives a a b a c a a."""
        for upstream in ready:
            upstream.current_weight += upstream.options.weight
        best = max(ready, key=lambda upstream: upstream.current_weight)
        best.current_weight -= sum(upstream.options.weight for upstream in ready)
        return best

    def weighted_random(self, ready: List[Upstream]) -> Upstream:
        """By weight, without memory."""
        point = self.rng() * sum(upstream.options.weight for upstream in ready)
        for upstream in ready:
            point -= upstream.options.weight
            if point < 0:
                return upstream
        return ready[-1]

    def least_connections(self, ready: List[Upstream]) -> Upstream:
        """Who has the fewest requests in flight for its weight; in turns among equals."""
        least = min(upstream.in_flight / upstream.options.weight for upstream in ready)
        return self.weighted_round_robin(
            [
                upstream
                for upstream in ready
                if upstream.in_flight / upstream.options.weight == least
            ]
        )

    # -- what all of them offer

    def refresh_models_async(self) -> None:
        """Learn the model lists in the background, now and then, if there is a choice that they could guide."""
        if len(self.upstreams) > 1 and self.clock() >= self.refresh_at:
            self.refresh_at = math.inf
            if not start_thread(self._refresh_models, "akashproxy models"):
                self.refresh_at = self.clock() + StaleOnErrorCache.RETRY

    def _refresh_models(self) -> None:
        try:
            self.models()
        except APIError as error:
            log.info("the models: %s", error.message)
        finally:
            incomplete = any(upstream.known_models is None for upstream in self.upstreams)
            self.refresh_at = self.clock() + (
                StaleOnErrorCache.RETRY if incomplete else self.settings.models_ttl
            )

    def models(self) -> List[Dict[str, Any]]:
        """The union of all model lists, each model once; 503 if there is none at all."""
        upstreams = [upstream for upstream in self.upstreams if upstream.options.weight > 0]
        found: Dict[str, Any] = {}

        def read(upstream: Upstream) -> None:
            found[upstream.name] = [], upstream.known_models, None
            found[upstream.name] = upstream.list_models()

        threads = [
            threading.Thread(target=read, args=(upstream,), daemon=True) for upstream in upstreams
        ]
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:  # no room for one more
                thread.run()
        for thread in threads:
            if thread.ident:
                thread.join()
        union: Dict[str, Dict[str, Any]] = {}
        with self.lock:  # all at once, so that meanwhile nobody gets more than its share
            for upstream in upstreams:
                models, upstream.known_models, _ = found[upstream.name]
                for model in models:
                    union.setdefault(model["id"], model)
            self._cached_candidates.cache_clear()
        self.model_names = frozenset(union)
        self.model_names_refresh_at = self.clock() + min(
            StaleOnErrorCache.RETRY, self.settings.models_ttl
        )
        if not union:
            errors = [error for _, _, error in found.values() if error]
            raise (
                errors[0]
                if len(errors) == 1
                else APIError(
                    503,
                    "No controller tells its models now.",
                    code="upstream_error",
                    retry_after=StaleOnErrorCache.RETRY,
                )
            )
        return list(union.values())

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        """A picture's bytes, from whoever has it."""
        error = APIError(404, f"There is no picture {name!r}.", code="not_found")
        for upstream in self.upstreams:
            try:
                with controller_errors(upstream.name):
                    return upstream.controller.image(name, scope)
            except APIError as failure:
                upstream.log_exception(failure)
                error = failure if failure.status != 404 else error
        raise error

    def __str__(self) -> str:
        return ", ".join(
            f"{upstream.name} ({upstream.options.base_url or upstream.options.type})"
            for upstream in self.upstreams
        )

    def status(self) -> List[Dict[str, Any]]:
        """What /status tells of each controller."""
        with self.lock:
            now = self.clock()
            return [
                {
                    "name": upstream.name,
                    "type": upstream.options.type,
                    "weight": upstream.options.weight,
                    "priority": upstream.options.priority,
                    "in_flight": upstream.in_flight,
                    "served": upstream.served,
                    "failed": upstream.failed,
                    "rests_for_seconds": max(0, math.ceil(upstream.cooldown_until - now)),
                    "models_cooling_down": sum(
                        cooldown.until > now
                        for (_, model), cooldown in upstream.cooldowns.items()
                        if model is not None
                    ),
                    "last_error": upstream.last_error or None,
                    "last_error_at": utc(upstream.last_error_at) if upstream.last_error else None,
                }
                for upstream in self.upstreams
            ]

    def close_expired(self, now: float) -> None:
        """Let go of what has been idle for too long."""
        for upstream in self.upstreams:
            upstream.controller.close_expired(now)

    def close(self, keep: Iterable[Upstream] = ()) -> None:
        for upstream in self.upstreams:
            if upstream not in keep:
                upstream.controller.close()


class Exchange:
    """A call on its way through the pool: who was asked, who is being asked, and what came of it.

    attempt() sends it to a controller; ``response`` is then its answer: an EventStream for whoever can feed it, else for
    events(). Where a controller fails before anything of its answer has been passed on, fail_over() makes way
    for the next one. Each is asked at most once. After Queued, attempt() is to be called again once ``call.wake``
    was. close() must follow.
    """

    def __init__(self, pool: Pool, call: Call) -> None:
        self.pool, self.call = pool, call
        self.upstream: Any = None
        self.response: Any = None
        self.tried: List[Upstream] = []
        self.errors: List[APIError] = []
        self.prepared, self.committed, self.started = False, False, 0.0
        self.unsupported = 0  # how many of those tried can't do it at all

    def attempt(self) -> bool:
        """Ask the next controller, or the last one again; is the answer an EventStream?

        APIError if none is left; Queued: to be called again once ``call.wake`` was. Worker thread.
        """
        if not self.prepared:
            self._prepare()
        while self.response is None:
            if self.upstream is None:
                self.upstream = self.pool.acquire(
                    self.call, self.tried, self.errors, self.unsupported
                )
                self.started = self.pool.clock()
                self.tried.append(self.upstream)
                self.call.retry_reason = ""
            self.call.new_scope()
            self.call.relay_content_type, self.call.ignored_params = None, []
            try:
                with controller_errors(self.upstream.name):
                    self.response = self.upstream.controller.events(self.call)
            except APIError as error:
                self.fail_over(error)
        return isinstance(self.response, EventStream)

    def _prepare(self) -> None:
        """Find out who is meant, and who can't do it."""
        requested = self.call.model
        self.pool.apply_alias(self.call)
        if not model_allowed(self.call.allowed_models, self.call.model):
            raise model_not_found(requested)
        self.prepared = True
        for upstream in self.pool.upstreams:
            error = self.pool.inability(upstream, self.call)
            if error:
                self.tried.append(upstream)
                self.errors.append(error)
        self.unsupported = len(self.tried)

    def events(self) -> Iterator[Event]:
        """The events of a source, in the thread that asks. An end without a Finish is an error: no "stop" is invented."""
        event = None
        with controller_errors(self.upstream.name):
            for event in self.response:
                if not isinstance(event, EVENTS):
                    raise TypeError(f"{type(event).__name__} is not an event")
                yield event
        if not isinstance(event, (Finish, RawBytes)):
            raise truncated(self.upstream.name)

    def commit(self) -> None:
        """The answer has begun: from now on nobody else can give it."""
        self.committed, self.call.answered_by = True, self.upstream.name
        self.call.attempts += (f"{self.upstream.name}=200",)

    def fail_over(self, error: APIError) -> None:
        """The controller gave no answer; APIError if no other one may give it either."""
        upstream = self.upstream
        if error.category == "again":
            self.call.retry_reason = error.code or ""
            self.end()
            return
        self.close(error)
        self.call.attempts += (f"{upstream.name}={error.upstream_status or error.status}",)
        log.info("%s: %s", upstream.name, error.message.removeprefix(f"{upstream.name}: "))
        if (
            not FAILURE_POLICY.get(error.category, FAILURE_POLICY["server"])[0]
            or self.call.cancel_reason
        ):
            raise error
        self.errors.append(error)

    def end(self) -> None:
        response, self.response = self.response, None
        with (
            contextlib.suppress(APIError),
            controller_errors(self.upstream.name if self.upstream else ""),
        ):
            if hasattr(response, "close"):
                response.close()

    def close(self, error: Optional[APIError] = None) -> None:
        """Let the controller go, with the error that ended its answer, if one did."""
        self.end()
        if self.call.waiter is not None:
            self.pool.leave_queue(self.call)
        upstream, self.upstream = self.upstream, None
        if upstream:
            if error is not None:
                upstream.log_exception(error)
            self.pool.release(upstream, error, self.committed, self.started, self.call.model)


# == 9. dialects ==============================================================================
# What clients speak: a body becomes a Call, events become bytes. Knows neither upstreams nor sockets.


class Dialect:
    """One request in a client's own format. ``call`` is what is asked; the rest is how it is answered.

    Streamed: opening_frames(), encode() for each batch of events, error_frames() where it breaks off. Else: response_body().
    ``base_url`` is the address under which the client sees this server.
    """

    PREFIX = "chatcmpl-"
    text_frame: Any = None  # text_frame(JSON of a text): its frame, where that can be made without taking the JSON apart

    def __init__(self, body: Any, base_url: str = "") -> None:
        if not isinstance(body, dict):
            raise bad_request("The body must be a JSON object.")
        self.base_url = base_url
        self.id = self.PREFIX + new_id()
        self.created = int(time.time())
        self.call = self.parse(body)
        self.call.original_body = body
        self.model = self.call.model  # as the client calls it

    def parse(self, body: Dict[str, Any]) -> Call:
        raise NotImplementedError

    def prepare(self) -> None:
        """Do in advance what takes long with a large body. Worker thread."""

    def opening_frames(self) -> bytes:
        """What a stream opens with, before the first event."""
        return b""

    def encode(self, events: List[Event]) -> bytes:
        """The frames of some events; those of Finish end the stream."""
        if len(events) != 1:
            return b"".join(map(self.encode_event, events))
        event = events[0]  # the usual
        return event.data if type(event) is RawBytes else self.encode_event(event)

    def encode_event(self, event: Event) -> bytes:
        """The frames of one event. Progress is told as a thought, an Image as a text; what is unknown is left out."""
        if isinstance(event, ImageProgress):
            before = f", {event.position} before it" if event.position else ""
            return self.encode_event(Reasoning(f"The picture is {event.status}{before}.\n"))
        if isinstance(event, Image):
            return self.encode_event(Text(self.markdown(event)))
        return event.data if isinstance(event, RawBytes) else b""

    def error_frames(self, error: APIError) -> bytes:
        """The end of a stream that breaks off. go-openai wants "error" to be the first key."""
        return b"data: " + to_json(self.error_body(error)) + b"\n\ndata: [DONE]\n\n"

    def ping_frame(self, style: str) -> bytes:
        """What fills silence: a comment, or where clients can't read those an empty event."""
        return b": keep-alive\n\n" if style == "comment" else b""

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        """The body for a client that does not stream."""
        raise NotImplementedError

    def local_response(self) -> Optional[Dict[str, Any]]:
        """The body for which no controller is needed; None if there is none."""
        return None

    @staticmethod
    def error_body(error: APIError) -> Dict[str, Any]:
        """An error's body: OpenAI's, and beside it the one of akashchat-api-go."""
        return {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            },
            "code": error.status,
            "data": {"msg": error.legacy_message},
        }

    @staticmethod
    def status(error: APIError) -> int:
        """An error's status."""
        return error.status

    @staticmethod
    def model_object(model: Dict[str, Any]) -> Dict[str, Any]:
        """One model, from OpenAI's object."""
        return model

    @staticmethod
    def model_list(models: List[Dict[str, Any]]) -> Dict[str, Any]:
        """The list of models."""
        return {"object": "list", "data": models}

    def text(self, answer: Answer) -> str:
        """An answer's text, its pictures after it."""
        return "\n\n".join(filter(None, [answer.text, *map(self.markdown, answer.images)]))

    def markdown(self, image: Image) -> str:
        """A picture for clients that show Markdown."""
        alt = re.sub(r"[\[\]\\\s]+", " ", image.prompt).strip()
        return f"![{alt}]({self.link(image)})"

    def link(self, image: Image) -> str:
        return f"{self.base_url}/images/{image.name}"


def required_field(body: Dict[str, Any], name: str, kind: type, description: str) -> Any:
    """A field that must be there, and not empty; APIError 400 else."""
    value = body.get(name)
    if value is None:
        raise bad_request(f"{name!r} is missing.", name)
    if not isinstance(value, kind):
        raise bad_request(f"{name!r} must be {description}.", name)
    if not value:
        raise bad_request(f"{name!r} must not be empty.", name)
    return value


def boolean_field(body: Dict[str, Any], name: str) -> bool:
    """A field that is true or false, and false where it is missing; APIError 400 for anything else."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name!r} must be true or false.", name)
    return bool(value)


class ChatCompletions(Dialect):
    """POST /v1/chat/completions, as openai-openapi pins it."""

    OBJECT, CHUNK = "chat.completion", "chat.completion.chunk"
    LAST_CHOICE = b'{"index":0,"delta":{}'  # a choice with no more to say, without its end

    def parse(self, body: Dict[str, Any]) -> Call:
        required_field(body, "model", str, "the name of a model")
        for at, message in enumerate(required_field(body, "messages", list, "a list of messages")):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise bad_request(
                    f"messages[{at}] must be an object with a 'role'.", f"messages[{at}]"
                )
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad_request("'stream_options' must be an object.", "stream_options")
        self.usage_asked = bool(as_dict(options).get("include_usage"))
        return Call(body, stream=boolean_field(body, "stream"))

    def ping_frame(self, style: str) -> bytes:
        return self.opening_frames() if style == "chunk" else super().ping_frame(style)

    def opening_frames(self) -> bytes:
        head = {"id": self.id, "object": self.CHUNK, "created": self.created, "model": self.model}
        self.head = b'data: %b,"choices":[' % to_json(head)[:-1]
        self.tail = self.chunk_tail(None)
        return self.frame({"role": "assistant", "content": ""})

    def chunk_tail(self, reason: Optional[str]) -> bytes:
        """The end of a choice and of its frame."""
        return (
            b',"finish_reason":'
            + to_json(reason)
            + (b'}],"usage":null}\n\n' if self.usage_asked else b"}]}\n\n")
        )

    def frame(self, delta: Dict[str, Any]) -> bytes:
        return self.head + b'{"index":0,"delta":' + to_json(delta) + self.tail

    def text_frame(self, text: bytes) -> bytes:
        return b'%b{"index":0,"delta":{"content":%b}%b' % (self.head, text, self.tail)

    def encode_event(self, event: Event) -> bytes:
        if isinstance(event, Text):
            return self.text_frame(to_json(event.text))
        if isinstance(event, Reasoning):
            return self.frame({"reasoning_content": event.text})
        if isinstance(event, ToolCall):
            return self.frame({"tool_calls": [{"index": event.index, **tool_call(event)}]})
        return (
            self.finish_frames(event) if isinstance(event, Finish) else super().encode_event(event)
        )

    def finish_frames(self, finish: Finish) -> bytes:
        last = self.head + self.LAST_CHOICE + self.chunk_tail(finish.reason)
        if self.usage_asked and finish.usage:
            last += self.head + b'],"usage":' + to_json(finish.usage) + b"}\n\n"
        return last + b"data: [DONE]\n\n"

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        text = self.text(answer)
        message: Dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tools:
            message["content"] = text or None
            message["tool_calls"] = list(map(tool_call, answer.tools))
        body = self.body({"index": 0, "message": message, "logprobs": None}, answer)
        if answer.images:
            image = answer.images[0]
            body.update(
                code=200,
                data={
                    "model": self.model,
                    "jobId": image.job,
                    "prompt": image.prompt,
                    "pic": image.url,
                },
            )
        return body

    def body(self, choice: Dict[str, Any], answer: Answer) -> Dict[str, Any]:
        finish = answer.finish
        body = {
            "id": self.id,
            "object": self.OBJECT,
            "created": self.created,
            "model": self.model,
            "choices": [{**choice, "finish_reason": finish.reason}],
        }
        if finish.usage:
            body["usage"] = finish.usage
        return body


def tool_call(event: ToolCall) -> Dict[str, Any]:
    """A call of a tool, or a fragment of one, in OpenAI's form."""
    if event.name is None:
        return {"function": {"arguments": event.arguments}}
    return {
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": event.arguments},
    }


class Completions(ChatCompletions):
    """POST /v1/completions, the legacy form, over a chat of one message."""

    PREFIX = "cmpl-"
    OBJECT = CHUNK = "text_completion"
    LAST_CHOICE = b'{"text":"","index":0,"logprobs":null'

    def parse(self, body: Dict[str, Any]) -> Call:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if prompt in (None, "", []):
            raise bad_request("'prompt' is missing or empty.", "prompt")
        translation_error = (
            None
            if isinstance(prompt, str)
            else bad_request("'prompt' must be one text here.", "prompt")
        )
        self.echo = prompt if boolean_field(body, "echo") and not translation_error else ""
        chat = {name: value for name, value in body.items() if name not in ("prompt", "echo")}
        call = super().parse({**chat, "messages": [{"role": "user", "content": prompt}]})
        call.translation_error = translation_error
        return call

    def encode(self, events: List[Event]) -> bytes:
        echo, self.echo = self.echo, ""  # what is relayed has its own
        return (
            self.frame({"content": echo}) if self.call.relay_content_type is None else b""
        ) + super().encode(events)

    def frame(self, delta: Dict[str, Any]) -> bytes:
        text = delta.get("content")  # the form has no place for thoughts and tools
        return self.text_frame(to_json(text)) if text else b""

    def text_frame(self, text: bytes) -> bytes:
        return b'%b{"text":%b,"index":0,"logprobs":null%b' % (self.head, text, self.tail)

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        text = self.echo + answer.text + "\n\n".join(map(self.markdown, answer.images))
        return self.body({"text": text, "index": 0, "logprobs": None}, answer)


class Images(Dialect):
    """POST /v1/images/generations."""

    def parse(self, body: Dict[str, Any]) -> Call:
        prompt = required_field(body, "prompt", str, "a text")
        count = number_field(body, "n", 1, integer=True, minimum=1)
        if body.get("model") is not None:
            required_field(body, "model", str, "a text")
        response_format, stream, translation_error = (
            body.get("response_format"),
            boolean_field(body, "stream"),
            None,
        )
        if count > 10:
            translation_error = bad_request("'n' may be 10 at most.", "n")
        elif response_format not in (None, "url", "b64_json"):
            translation_error = bad_request(
                "'response_format' must be 'url' or 'b64_json'.", "response_format"
            )
        elif stream:
            translation_error = bad_request(
                "Pictures can't be streamed here; ask for one through chat instead.", "stream"
            )
        rest = {
            name: value
            for name, value in body.items()
            if value is not None and name not in ("prompt", "n", "response_format", "stream")
        }
        return Call(
            {**rest, "messages": [{"role": "user", "content": prompt}]},
            stream=stream,
            image_count=count,
            images_as_bytes=response_format == "b64_json",
            translation_error=translation_error,
        )

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        return {
            "created": self.created,
            "data": [
                {
                    **(
                        {"b64_json": base64.b64encode(image.data).decode()}
                        if image.data is not None
                        else {"url": self.link(image)}
                    ),
                    "revised_prompt": image.prompt,
                }
                for image in answer.images
            ],
        }


class BlockDialect(Dialect):
    """What Messages and Responses share: a request as a chat, an answer as a row of blocks that never interleave.

    Fragments of calls of tools may come interleaved: what comes while a call is not whole waits until the
    end. To be given: to_chat(), the request in a chat's terms, without what is the SAME there (APIError 400
    for what a chat can't say); start_block(event), delta(text), stop_block(text) and finish_frames(finish), the frames that
    open a block, whose event has no text yet, fill and close it, and end the stream.
    """

    RENAMED_PARAMS: Dict[str, str] = {}  # fields that a chat has too, and their names there
    KNOWN_PARAMS: Tuple[str, ...] = ()  # fields that to_chat() knows; others are told to be ignored
    FUNCTION_TYPES: Tuple[Any, ...] = ()  # the types of tools that are functions,
    SCHEMA_KEY = ""  # and where they tell their parameters

    def __init__(self, body: Any, base_url: str = "") -> None:
        self.untranslated: List[str] = []
        self.show_reasoning = True  # does the client want to see them?
        self.open_block: Any = None  # which one is open: its events' class, and the index of a call
        self.open_text: List[str] = []  # what it holds
        self.block_index = 0  # how many are closed: the index of the open one
        self.tool_blocks: set = set()  # those of tools
        self.deferred: List[Event] = []
        super().__init__(body, base_url)

    # -- the request

    def parse(self, body: Dict[str, Any]) -> Call:
        call = Call(
            {"model": required_field(body, "model", str, "the name of a model")},
            stream=boolean_field(body, "stream"),
        )
        self.untranslated += [
            name
            for name in body
            if name not in self.RENAMED_PARAMS and name not in self.KNOWN_PARAMS
        ]
        same = {theirs: body[name] for name, theirs in self.RENAMED_PARAMS.items() if name in body}
        try:
            chat = {**call.body, "stream": call.stream, **same, **self.to_chat(body)}
            chat["messages"] = merge_system_messages(chat["messages"])
            call.body = {name: value for name, value in chat.items() if value is not None}
            if not chat["messages"]:
                raise bad_request("No message has any content.")
        except RecursionError:
            raise bad_request("The body is nested too deeply.") from None
        except APIError as error:  # a controller that speaks this format itself may still take it
            call.translation_error = error
        call.untranslated = self.untranslated
        return call

    @staticmethod
    def append_message(
        messages: List[Dict[str, Any]], role: str, parts: List[Dict[str, Any]], calls: Any = ()
    ) -> None:
        """Add a message, unless it is empty."""
        texts = [part["text"] for part in parts if part["type"] == "text"]
        content = "\n\n".join(texts) if len(texts) == len(parts) else parts
        if content or calls:
            messages.append(
                {
                    "role": role,
                    "content": content or None,
                    **({"tool_calls": calls} if calls else {}),
                }
            )

    def append_tool_result(
        self, messages: List[Dict[str, Any]], call: Any, content: Any, param: str
    ) -> List[Dict[str, Any]]:
        """Add what a tool gave, as text; its pictures are returned, for a message of the user."""
        parts = self.convert_content(content, param, lenient=True)
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        messages.append({"role": "tool", "tool_call_id": call, "content": text})
        return [part for part in parts if part["type"] != "text"]

    def convert_content(
        self, content: Any, param: str, lenient: bool = False
    ) -> List[Dict[str, Any]]:
        """The parts of a chat's message from text, a block or a list of them."""
        if not isinstance(content, list):
            return self.convert_part(content, param, lenient)
        return [
            part
            for at, block in enumerate(content)
            for part in self.convert_part(block, f"{param}[{at}]", lenient)
        ]

    def convert_part(self, block: Any, param: str, lenient: bool = False) -> List[Dict[str, Any]]:
        """A block of either format as parts of a chat. What is unknown is refused, or ``lenient`` told as its JSON."""
        if isinstance(block, str):
            return [{"type": "text", "text": block}]
        fields = as_dict(block)
        kind, source = fields.get("type"), as_dict(fields.get("source"))
        if kind in ("text", "input_text", "output_text", "refusal"):
            text = fields.get("refusal" if kind == "refusal" else "text")
            if isinstance(text, str):
                return [{"type": "text", "text": text}]
        if kind in ("image", "input_image"):
            url = fields.get("image_url") or source.get("url")
            if source.get("type") == "base64":
                url = f"data:{source.get('media_type')};base64,{source.get('data')}"
            if isinstance(url, str):
                return [{"type": "image_url", "image_url": {"url": url}}]
        if kind == "document" and source.get("type") in ("text", "content"):
            return self.convert_content(source.get("data") or source.get("content"), param, lenient)
        if lenient:
            return [{"type": "text", "text": _encode(block)}] if block is not None else []
        raise bad_request(
            f"{param}: {str(kind or block)[:80]!r} can't be told to a model that only chats.", param
        )

    def convert_tools(self, tools: Any) -> Optional[List[Dict[str, Any]]]:
        """The tools that are functions, as a chat has them; None if there are none."""
        found = []
        if tools is not None and not isinstance(tools, list):
            raise bad_request("'tools' must be a list.", "tools")
        for at, tool in enumerate(map(as_dict, tools or [])):
            if tool.get("type") not in self.FUNCTION_TYPES:
                self.untranslated.append(str(tool.get("type")))
                continue
            name = required_field(tool, "name", str, f"a text in tools[{at}]")
            more = {
                key: tool[key] for key in ("description", "strict") if tool.get(key) is not None
            }
            schema = tool.get(self.SCHEMA_KEY) or {"type": "object", "properties": {}}
            found.append(
                {"type": "function", "function": {"name": name, **more, "parameters": schema}}
            )
        return found or None

    # -- the answer

    def encode_event(self, event: Event) -> bytes:
        if (
            isinstance(event, (Text, ToolCall))
            or isinstance(event, Reasoning)
            and self.show_reasoning
        ):
            return self.encode_block(event)
        if isinstance(event, Finish):
            return self.flush_deferred() + self.close() + self.finish_frames(event)
        return super().encode_event(event)

    def encode_block(self, event: Event, may_defer: bool = True) -> bytes:
        frames, block = b"", self.block_key(event)
        if block != self.open_block:
            if block in self.tool_blocks:  # blanks after the end of it
                return b""
            if may_defer and (self.deferred or self.has_partial_arguments()):
                self.deferred.append(event)
                return b""
            frames = self.close()
            self.open_block = block
            if isinstance(event, ToolCall):
                self.tool_blocks.add(block)
            frames += self.start_block(
                with_id(event, "") if isinstance(event, ToolCall) else type(event)("")
            )
        text = event.arguments if isinstance(event, ToolCall) else event.text
        if not text:
            return frames
        self.open_text.append(text)
        return frames + self.delta(text)

    @staticmethod
    def block_key(event: Event) -> Any:
        """The block that an event belongs to."""
        return type(event), getattr(event, "index", None)

    def has_partial_arguments(self) -> bool:
        """Is a call of a tool open whose arguments are not whole?"""
        if self.open_block not in self.tool_blocks:
            return False
        try:
            json.loads("".join(self.open_text))
        except (ValueError, RecursionError):
            return True
        return False

    def flush_deferred(self) -> bytes:
        """The blocks that wait, each in one piece."""
        deferred, self.deferred = self.deferred, []
        order = {key: at for at, key in enumerate(dict.fromkeys(map(self.block_key, deferred)))}
        deferred.sort(key=lambda event: order[self.block_key(event)])
        return b"".join(self.encode_block(event, may_defer=False) for event in deferred)

    def close(self) -> bytes:
        """The end of the open block, if there is one."""
        if self.open_block is None:
            return b""
        frames = self.stop_block("".join(self.open_text))
        self.open_block, self.open_text, self.block_index = None, [], self.block_index + 1
        return frames

    def answer_blocks(self, answer: Answer) -> List[Event]:
        """A whole answer as an event for each block."""
        blocks = [Reasoning(answer.reasoning)] * self.show_reasoning + [Text(self.text(answer))]
        calls = [with_id(call, call.arguments or "{}") for call in answer.tools]
        return [event for event in blocks if event.text] + calls

    @staticmethod
    def status(error: APIError) -> int:
        return 404 if error.category == "model" else error.status


def merge_system_messages(messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Those of the system that follow one another as one message, as many models take but one, at the beginning."""

    def is_text(message: Dict[str, Any]) -> bool:
        return (
            message["role"] == "system"
            and isinstance(message["content"], str)
            and "tool_calls" not in message
        )

    joined: List[Dict[str, Any]] = []
    for texts, group in itertools.groupby(messages, key=is_text):
        joined += (
            [{"role": "system", "content": "\n\n".join(each["content"] for each in group)}]
            if texts
            else group
        )
    return joined


def with_id(call: ToolCall, arguments: str) -> ToolCall:
    """A call of a tool with other arguments, and with an id and a name even if the upstream gave none."""
    return ToolCall(call.index, arguments, call.id or "call_" + new_id(), call.name or "")


def event_frame(kind: str, fields: Dict[str, Any]) -> bytes:
    """An event of a stream whose name is also its type."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), to_json({"type": kind, **fields}))


class Messages(BlockDialect):
    """POST /v1/messages, Anthropic's API. A line is an event, its name and what its data holds beside that as type:

        message_start        {"message":{"id":"msg_1","content":[],"usage":{"input_tokens":9,...},...}}
        content_block_start  {"index":0,"content_block":{"type":"text","text":""}}   Text; also thinking, tool_use
        content_block_delta  {"index":0,"delta":{"type":"text_delta","text":"Hi"}}   thinking_delta, input_json_delta
        content_block_stop   {"index":0}
        message_delta        {"delta":{"stop_reason":"end_turn",...},"usage":{...}}  Finish
        message_stop         {}
        error                {"error":{"type":"api_error","message":"..."}}          in place of what was to come
        ping                 {}                                                      anywhere

    Tokens that the upstream does not tell are estimated, as clients need them. Thoughts are shown to who asks for
    them by ``thinking``; those that come back in a history are left out.
    """

    PREFIX = "msg_"
    RENAMED_PARAMS = {
        "max_tokens": "max_tokens",
        "temperature": "temperature",
        "top_p": "top_p",
        "stop_sequences": "stop",
    }
    KNOWN_PARAMS = (
        "model",
        "messages",
        "system",
        "stream",
        "tools",
        "tool_choice",
        "thinking",
        "metadata",
        "output_config",
        "output_format",
    )
    FUNCTION_TYPES, SCHEMA_KEY = (None, "custom"), "input_schema"
    DELTAS = {
        Text: (b"text_delta", b"text"),
        Reasoning: (b"thinking_delta", b"thinking"),
        ToolCall: (b"input_json_delta", b"partial_json"),
    }
    STOPS = {
        "length": "max_tokens",
        "tool_calls": "tool_use",
        "function_call": "tool_use",
        "content_filter": "refusal",
    }
    ERRORS = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }
    output_estimate = 0  # tokens of the blocks that are closed, estimated
    estimated: Optional[int] = None  # tokens of the request, once they are counted

    # -- the request

    def to_chat(self, body: Dict[str, Any]) -> Dict[str, Any]:
        thinking, config = as_dict(body.get("thinking")), as_dict(body.get("output_config"))
        self.show_reasoning = (
            thinking.get("type") not in (None, "disabled") and thinking.get("display") != "omitted"
        )
        messages: List[Dict[str, Any]] = []
        self.append_message(
            messages, "system", self.convert_content(body.get("system") or [], "system")
        )
        for at, message in enumerate(required_field(body, "messages", list, "a list of messages")):
            self.convert_message(messages, as_dict(message), f"messages[{at}]")
        chat = {"messages": messages, "user": as_dict(body.get("metadata")).get("user_id")}
        response_format = as_dict(config.get("format") or body.get("output_format"))
        if response_format.get("type") == "json_schema":
            chat["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": "answer",
                    "schema": response_format.get("schema"),
                    "strict": True,
                },
            }
        self.untranslated += [f"output_config.{name}" for name in config if name != "format"]
        self.untranslated += ["thinking.budget_tokens"] * (
            "budget_tokens" in thinking
        )  # many would refuse an effort
        chat["tools"] = self.convert_tools(body.get("tools"))
        if chat["tools"]:
            choice = as_dict(body.get("tool_choice"))
            chat["tool_choice"] = self.convert_tool_choice(choice)
            chat["parallel_tool_calls"] = (
                False if choice.get("disable_parallel_tool_use") is True else None
            )
        return chat

    def convert_message(
        self, messages: List[Dict[str, Any]], message: Dict[str, Any], param: str
    ) -> None:
        """One message as those of a chat: the results of tools come first, as they follow their calls."""
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise bad_request(
                f"{param}: there is no role {str(role)[:80]!r}; use user or assistant.",
                f"{param}.role",
            )
        parts: List[Dict[str, Any]] = []
        calls: List[Dict[str, Any]] = []
        for at, block in enumerate(content if isinstance(content, list) else [content]):
            fields, block_param = as_dict(block), f"{param}.content[{at}]"
            kind = fields.get("type")
            if kind == "tool_use":
                arguments = _encode(as_dict(fields.get("input")))
                calls.append(
                    tool_call(ToolCall(0, arguments, fields.get("id"), str(fields.get("name"))))
                )
            elif kind == "tool_result":
                parts += self.append_tool_result(
                    messages, fields.get("tool_use_id"), fields.get("content"), block_param
                )
            elif role == "assistant" and kind not in ("text", None):
                self.untranslated += [str(kind)] * ("thinking" not in str(kind))
            else:
                parts += self.convert_part(block, block_param)
        self.append_message(messages, role, parts, calls)

    @staticmethod
    def convert_tool_choice(choice: Dict[str, Any]) -> Any:
        """A chat's tool_choice."""
        kind = choice.get("type")
        if kind == "tool":
            return {"type": "function", "function": {"name": choice.get("name")}}
        if kind not in (None, "auto", "any", "none"):
            raise bad_request(
                "'tool_choice' must be of the type auto, any, none or tool.", "tool_choice"
            )
        return "required" if kind == "any" else kind

    # -- the answer

    def opening_frames(self) -> bytes:
        return event_frame(
            "message_start",
            {
                "message": {
                    **self.message_object([]),
                    "usage": {"input_tokens": self.estimate_input_tokens(), "output_tokens": 0},
                }
            },
        )

    def start_block(self, event: Event) -> bytes:
        self.head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%b","%b":' % (self.block_index, *self.DELTAS[type(event)])
        )
        return event_frame(
            "content_block_start",
            {"index": self.block_index, "content_block": self.content_block(event)},
        )

    def delta(self, text: str) -> bytes:
        return self.head + to_json(text) + b"}}\n\n"

    def stop_block(self, text: str) -> bytes:
        self.output_estimate += estimate_tokens(text)
        return event_frame("content_block_stop", {"index": self.block_index})

    def finish_frames(self, finish: Finish) -> bytes:
        payload = {
            "delta": self.stop_fields(finish, bool(self.tool_blocks)),
            "usage": self.usage_object(finish),
        }
        return event_frame("message_delta", payload) + event_frame("message_stop", {})

    def error_frames(self, error: APIError) -> bytes:
        return self.flush_deferred() + event_frame("error", self.error_body(error))

    def ping_frame(self, style: str) -> bytes:
        return b"" if style == "off" else event_frame("ping", {})

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        self.output_estimate = estimate_tokens(
            [answer.reasoning, answer.text, [call.arguments for call in answer.tools]]
        )
        return {
            **self.message_object(list(map(self.content_block, self.answer_blocks(answer)))),
            **self.stop_fields(answer.finish, bool(answer.tools)),
            "usage": self.usage_object(answer.finish),
        }

    def message_object(self, content: List[Dict[str, Any]]) -> Dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    @staticmethod
    def content_block(event: Event) -> Dict[str, Any]:
        if isinstance(event, ToolCall):
            return {
                "type": "tool_use",
                "id": event.id,
                "name": event.name,
                "input": call_input(event.arguments),
            }
        if isinstance(event, Reasoning):
            return {"type": "thinking", "thinking": event.text, "signature": ""}
        return {"type": "text", "text": event.text}

    def stop_fields(self, finish: Finish, called: bool) -> Dict[str, Any]:
        """Why it ended, in Anthropic's words. Some upstreams say "stop" after calls of tools."""
        reason = "tool_calls" if called and finish.reason == "stop" else finish.reason
        return {
            "stop_reason": "stop_sequence"
            if finish.stop_sequence
            else self.STOPS.get(reason, "end_turn"),
            "stop_sequence": finish.stop_sequence,
        }

    def usage_object(self, finish: Finish) -> Dict[str, int]:
        """The tokens that were told, those from a cache apart; else an estimate."""
        if not finish.usage:
            return {
                "input_tokens": self.estimate_input_tokens(),
                "output_tokens": self.output_estimate,
            }
        prompt, cached = (
            finish.usage["prompt_tokens"],
            usage_detail(finish.usage, "prompt", "cached_tokens"),
        )
        cached = cached if 0 < cached < prompt else 0
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "output_tokens": finish.usage["completion_tokens"],
        }

    def estimate_input_tokens(self) -> int:
        """About how many tokens the request has."""
        if self.estimated is None:
            self.estimated = estimate_tokens(
                [self.call.original_body.get(name) for name in ("system", "messages", "tools")]
            )
        return self.estimated

    def prepare(self) -> None:
        self.estimate_input_tokens()

    @staticmethod
    def status(error: APIError) -> int:
        return 529 if error.status == 503 else BlockDialect.status(error)

    @staticmethod
    def error_body(error: APIError) -> Dict[str, Any]:
        status = Messages.status(error)
        return {
            "type": "error",
            "error": {
                "message": error.message,
                "type": Messages.ERRORS.get(
                    status, "api_error" if status >= 500 else "invalid_request_error"
                ),
            },
        }

    @staticmethod
    def model_object(model: Dict[str, Any]) -> Dict[str, Any]:
        created = model.get("created") if type(model.get("created")) is int else 0
        return {
            "type": "model",
            "id": model["id"],
            "display_name": model["id"],
            "lifecycle": "active",
            "created_at": time.strftime(
                "%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(max(created, 0), 1 << 33))
            ),
        }

    @staticmethod
    def model_list(models: List[Dict[str, Any]]) -> Dict[str, Any]:
        ids = [model["id"] for model in models] or [None]
        return {
            "data": list(map(Messages.model_object, models)),
            "has_more": False,
            "first_id": ids[0],
            "last_id": ids[-1],
        }


def call_input(arguments: str) -> Dict[str, Any]:
    """The arguments of a call of a tool as an object; what is none is told as a text in one."""
    try:
        value = from_json(arguments.strip().encode("utf-8", "replace") or b"{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def usage_detail(usage: Dict[str, Any], of: str, name: str) -> int:
    """One of the details of OpenAI's usage of the prompt or the completion; 0 if it is not told."""
    return count_or_none(as_dict(usage.get(of + "_tokens_details")).get(name)) or 0


class CountTokens(Messages):
    """POST /v1/messages/count_tokens: of a controller that counts them itself, else estimated."""

    def parse(self, body: Dict[str, Any]) -> Call:
        model = body.get("model")
        return Call({"model": model} if isinstance(model, str) else {}, relay_only=True)

    def local_response(self) -> Optional[Dict[str, Any]]:
        return {"input_tokens": self.estimate_input_tokens()}


class Responses(BlockDialect):
    """POST /v1/responses, without a memory. A line is an event, its name and what its data holds beside that as type:

        response.created             {"sequence_number":0,"response":{"id":"resp_1","output":[],...}}
        response.in_progress         the same
        response.output_item.added   {"output_index":0,"item":{"id":"msg_1","type":"message","content":[],...}}  Text
        response.content_part.added  {"item_id":"msg_1","output_index":0,"content_index":0,"part":{"text":"",...}}
        response.output_text.delta   {..., "delta":"Hi"}
        response.output_text.done    {..., "text":"Hi"}
        response.content_part.done   {..., "part":{"text":"Hi",...}}
        response.output_item.done    {"output_index":0,"item":{...}}
        response.completed           {"response":{...}}                   Finish; also response.incomplete
        error                        {"code":"upstream_error","message":"...",...}, then response.failed

    Reasoning is an item with a summary, response.reasoning_summary_part.* and response.reasoning_summary_text.*; a
    call of a tool an item function_call, response.function_call_arguments.*. Every event has its sequence_number.
    """

    PREFIX = "resp_"
    RENAMED_PARAMS = {
        "max_output_tokens": "max_tokens",
        "temperature": "temperature",
        "top_p": "top_p",
        "user": "user",
    }
    ECHOED = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": None,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
    }
    STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
    ECHO_LIMIT = (
        1 << 16
    )  # bytes of a field that is repeated; a larger one is left out, as a stream has all of them twice or more
    KNOWN_PARAMS = (*ECHOED, *STATEFUL, "model", "input", "stream", "store")
    FUNCTION_TYPES, SCHEMA_KEY = ("function",), "parameters"
    ITEM_WIRE: Dict[
        Any, Any
    ] = {  # prefix of an item's id, its events, their index, what else those of its text hold
        Text: (
            "msg_",
            "response.output_text",
            "response.content_part",
            {"content_index": 0},
            {"logprobs": []},
        ),
        Reasoning: (
            "rs_",
            "response.reasoning_summary_text",
            "response.reasoning_summary_part",
            {"summary_index": 0},
            {},
        ),
        ToolCall: ("fc_", "response.function_call_arguments", "", {}, {}),
    }

    sequence_number = 0  # of the next event
    stream_started = False
    echoed: Optional[Dict[str, Any]] = None

    def __init__(self, body: Any, base_url: str = "") -> None:
        self.output: List[Dict[str, Any]] = []  # the items that are whole
        super().__init__(body, base_url)

    # -- the request

    def to_chat(self, body: Dict[str, Any]) -> Dict[str, Any]:
        for name in self.STATEFUL:
            if body.get(name):
                raise not_stored(name, name)
        text, reasoning, messages = as_dict(body.get("text")), as_dict(body.get("reasoning")), []
        self.append_message(
            messages, "system", self.convert_content(body.get("instructions") or [], "instructions")
        )
        if isinstance(body.get("input"), str):
            self.append_message(messages, "user", self.convert_content(body["input"], "input"))
        else:
            self.convert_items(
                messages, required_field(body, "input", list, "a text or a list of items")
            )
        self.untranslated += [f"text.{name}" for name in text if name != "format"] + ["store"] * (
            body.get("store") is True
        )
        chat = {
            "messages": messages,
            "reasoning_effort": reasoning.get("effort"),
            "response_format": self.response_format(as_dict(text.get("format"))),
            "tools": self.convert_tools(body.get("tools")),
        }
        if chat["tools"]:
            chat["tool_choice"] = self.convert_tool_choice(body.get("tool_choice"))
            chat["parallel_tool_calls"] = body.get("parallel_tool_calls")
        return chat

    @staticmethod
    def response_format(format_spec: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """A chat's response_format."""
        schema = {
            name: value
            for name, value in format_spec.items()
            if name != "type" and value is not None
        }
        if format_spec.get("type") in (None, "text"):
            return None
        return {"type": format_spec["type"], **({"json_schema": schema} if schema else {})}

    def convert_items(self, messages: List[Dict[str, Any]], items: List[Any]) -> None:
        """The items of an input as messages of a chat; pictures that tools gave follow the last result."""
        images: List[Dict[str, Any]] = []
        for at, item in enumerate(map(as_dict, items)):
            param, kind = f"input[{at}]", item.get("type", "message")
            if kind == "function_call_output":
                images += self.append_tool_result(
                    messages, item.get("call_id"), item.get("output"), f"{param}.output"
                )
                continue
            self.append_message(messages, "user", images)
            images = []
            if kind == "message":
                role = "system" if item.get("role") == "developer" else item.get("role")
                if role not in ("user", "assistant", "system"):
                    raise bad_request(
                        f"{param}: there is no role {str(role)[:80]!r}.", f"{param}.role"
                    )
                self.append_message(
                    messages, role, self.convert_content(item.get("content"), f"{param}.content")
                )
            elif kind == "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(
                    tool_call(
                        ToolCall(
                            0,
                            str(item.get("arguments") or "{}"),
                            item.get("call_id"),
                            str(item.get("name")),
                        )
                    )
                )
            elif kind == "item_reference" and not str(item.get("id")).startswith(
                "rs_"
            ):  # as WIRE names reasoning
                raise not_stored("An item_reference", param)
            elif kind != "reasoning":
                self.untranslated.append(str(kind))
        self.append_message(messages, "user", images)

    def convert_tool_choice(self, choice: Any) -> Any:
        """A chat's tool_choice."""
        fields = as_dict(choice)
        if fields.get("type") == "function":
            return {"type": "function", "function": {"name": fields.get("name")}}
        if fields.get("type") == "allowed_tools":
            self.untranslated.append("tool_choice.tools")
            return fields.get("mode")
        self.untranslated += ["tool_choice"] * bool(fields)
        return None if fields else choice

    # -- the answer

    def opening_frames(self) -> bytes:
        self.stream_started, response = True, {"response": self.response_object()}
        return self.frame("response.created", response) + self.frame(
            "response.in_progress", response
        )

    def encode(self, events: List[Event]) -> bytes:
        self.stream_started = True  # or relayed
        return super().encode(events)

    def frame(self, kind: str, fields: Dict[str, Any]) -> bytes:
        self.sequence_number += 1
        return event_frame(kind, {"sequence_number": self.sequence_number - 1, **fields})

    def start_block(self, event: Event) -> bytes:
        prefix, name, part, index, more = self.ITEM_WIRE[type(event)]
        item = self.output_item(event, prefix + new_id(), "in_progress")
        self.open_item, self.item_ref = (
            event,
            {"item_id": item["id"], "output_index": self.block_index, **index},
        )
        delta, ref = (name + ".delta").encode(), to_json({**self.item_ref, **more})[1:-1]
        self.head = b'event: %b\ndata: {"type":"%b",%b,"sequence_number":' % (delta, delta, ref)
        frames = self.frame(
            "response.output_item.added", {"output_index": self.block_index, "item": item}
        )
        if part:
            frames += self.frame(
                part + ".added", {**self.item_ref, "part": self.part_object(event)}
            )
        return frames

    def delta(self, text: str) -> bytes:
        self.sequence_number += 1
        return b'%b%d,"delta":%b}\n\n' % (self.head, self.sequence_number - 1, to_json(text))

    def stop_block(self, text: str) -> bytes:
        _, name, part, _, more = self.ITEM_WIRE[type(self.open_item)]
        if isinstance(self.open_item, ToolCall):
            text = text or "{}"
            event, key = with_id(self.open_item, text), "arguments"
        else:
            event, key = type(self.open_item)(text), "text"
        self.output.append(self.output_item(event, self.item_ref["item_id"]))
        frames = self.frame(name + ".done", {**self.item_ref, **more, key: text})
        if part:
            frames += self.frame(part + ".done", {**self.item_ref, "part": self.part_object(event)})
        return frames + self.frame(
            "response.output_item.done", {"output_index": self.block_index, "item": self.output[-1]}
        )

    def finish_frames(self, finish: Finish) -> bytes:
        response = self.response_object(finish)
        return self.frame(f"response.{response['status']}", {"response": response})

    def error_frames(self, error: APIError) -> bytes:
        opening = self.flush_deferred() if self.stream_started else self.opening_frames()
        details = self.error_body(error)["error"]
        failed = {
            "status": "failed",
            "error": {"code": error.code or "server_error", "message": error.message},
        }
        return (
            opening
            + self.frame("error", {**details, "type": "error", "error": details})
            + self.frame("response.failed", {"response": {**self.response_object(), **failed}})
        )

    def response_body(self, answer: Answer) -> Dict[str, Any]:
        self.output = [
            self.output_item(event, self.ITEM_WIRE[type(event)][0] + new_id())
            for event in self.answer_blocks(answer)
        ]
        return self.response_object(answer.finish)

    def response_object(self, finish: Optional[Finish] = None) -> Dict[str, Any]:
        """The response as it is by now."""
        usage = finish and finish.usage
        reason = finish and {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            finish.reason
        )
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "output": self.output,
            "status": "incomplete" if reason else "completed" if finish else "in_progress",
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            **self.echoed_params(),
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": response_usage(usage) if usage else None,
        }

    def echoed_params(self) -> Dict[str, Any]:
        """The fields of the request that a response repeats; one above ECHO_LIMIT as if it had not been sent."""
        if self.echoed is None:
            sent = {
                name: self.call.original_body[name]
                for name in self.ECHOED
                if self.call.original_body.get(name) is not None
            }
            small = {name: value for name, value in sent.items() if self.is_small(value)}
            self.echoed = {**self.ECHOED, **small}
        return self.echoed

    @classmethod
    def is_small(cls, value: Any) -> bool:
        size = (
            len(value)
            if isinstance(value, str)
            else 0
            if isinstance(value, (int, float))
            else len(_encode(value))
        )
        return size <= cls.ECHO_LIMIT

    def prepare(self) -> None:
        self.echoed_params()

    @staticmethod
    def part_object(event: Event) -> Dict[str, Any]:
        """What an item holds."""
        if isinstance(event, Reasoning):
            return {"type": "summary_text", "text": event.text}
        return {"type": "output_text", "text": event.text, "annotations": [], "logprobs": []}

    def output_item(self, event: Event, item_id: str, status: str = "completed") -> Dict[str, Any]:
        """An item of the output: one that is opened has no parts."""
        if isinstance(event, ToolCall):
            return {
                "id": item_id,
                "type": "function_call",
                "status": status,
                "call_id": event.id,
                "name": event.name,
                "arguments": event.arguments,
            }
        parts = [self.part_object(event)] if status == "completed" else []
        if isinstance(event, Reasoning):
            return {"id": item_id, "type": "reasoning", "status": status, "summary": parts}
        return {
            "id": item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": parts,
        }


def response_usage(usage: Dict[str, Any]) -> Dict[str, Any]:
    """OpenAI's usage of a chat in the words of a response."""
    cached = usage_detail(usage, "prompt", "cached_tokens")
    reasoned = usage_detail(usage, "completion", "reasoning_tokens")
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
    }


def not_stored(name: str, param: str) -> APIError:
    """What refers to an earlier response can't be honoured."""
    return bad_request(
        f"{name!r} can't be used: nothing is stored here. Send the whole conversation as 'input' "
        '(with "store": false many clients do).',
        param,
    )


class Passthrough(Dialect):
    """Any other POST below /v1: passed on to a controller that offers it, its format unknown."""

    PATH = re.compile(r"/v1(/[A-Za-z0-9_-]+)+")

    def __init__(self, data: bytes, content_type: str) -> None:
        body = self.document(data) if is_json(content_type, data) else {}
        model = body.get("model")
        self.call = Call(
            {"model": model} if isinstance(model, str) else {}, stream=True, relay_only=True
        )
        self.call.original_body = body or None
        # What was read as UTF-8 is sent as that: another charset would let the upstream read another model.
        self.call.content_type = (
            "application/json" if body else content_type or "application/octet-stream"
        )

    @staticmethod
    def document(data: bytes) -> Dict[str, Any]:
        """The body's object; {} if it is something else, as the upstream may know what that is."""
        check_json(data, MAX_RELAYED_VALUES)
        try:
            return as_dict(_parse(data))
        except ValueError:
            return {}

    def ping_frame(self, style: str) -> bytes:
        return b""


def is_json(content_type: str, data: bytes) -> bool:
    """Whether a relayed body is JSON. curl labels any body as a form unless told otherwise."""
    media_type = content_type.partition(";")[0].strip(" \t").lower()
    return (
        media_type == "application/json"
        or media_type == URLENCODED
        and data[:64].lstrip().startswith(b"{")
    )


# -- the model that a body names, for keys that are limited to some: no upstream may be able to read another one

URLENCODED = "application/x-www-form-urlencoded"
MAX_FORM_PARTS = 1000
MAX_PART_HEAD = 4096
MODEL_IN_PATH = frozenset(
    ("deployments", "engines", "models")
)  # segments after which some upstreams read a model
_UTF_8 = r'(?: *; *charset="?utf-8"?)?'
_MULTIPART = re.compile(
    rf"multipart/form-data{_UTF_8} *; *boundary=(\"?)([0-9A-Za-z'()+_,./:=?-]{{1,70}})\1{_UTF_8}",
    re.I,
)
_DISPOSITION = re.compile(
    r'form-data; *name=(?:"([^"\\%]*)"|([A-Za-z0-9_.-]+))'
    r'(; *filename=(?:"[^"\\]*"|[^;"\\ ]+))?(; *filename\*=[^;" ]+)?',
    re.I,
)


def is_model_field(name: str) -> bool:
    """Whether some upstream takes a field's name for "model": Go ignores case, PHP what follows a bracket."""
    return name.partition("[")[0].partition("\0")[0].strip().casefold() == "model"


def remove_model_params(query: str) -> str:
    """A query without a model: the body's has been checked, but LiteLLM would prefer the query's."""
    parts = re.split("[&;]", query)
    remaining = [
        part
        for part in parts
        if not is_model_field(urllib.parse.unquote_plus(part.partition("=")[0]))
    ]
    return query if len(remaining) == len(parts) else "&".join(remaining)


def has_escaped_letters(data: bytes) -> bool:
    """Whether JSON may hold a second "model" that a search for these bytes misses, such as "mod\\u0065l"."""
    return b"\\u006" in data or b"\\u004" in data


def check_names(names: Iterable[str], refused: Iterable[str] = ()) -> None:
    """Check the names of a body's fields: APIError 400 for one that is refused, or that is "model" to some upstreams only."""
    for name in names:
        if "model" in name.lower() and name != "model" and is_model_field(name):
            raise bad_request(f"The field {name[:40]!r} must be written 'model'.", "model")
    refused = {name.casefold() for name in refused}
    for name in names if refused else ():
        if name.casefold() in refused:
            raise bad_request(f"The field {name[:40]!r} is not allowed for this key.", name[:40])


def check_charset(content_type: str) -> None:
    """Check that a body's charset is ours: APIError 415 where an upstream would read other letters."""
    for parameter in content_type.lower().split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' \t"') not in ("utf-8", "utf8"):
            raise APIError(415, "The charset of the body must be UTF-8.")


def apply_key_limits(call: Call, options: ClientKeySettings, headers: Dict[str, str]) -> None:
    """Limit a call to its key's models and fields; APIError if an upstream could read the body in another way."""
    call.allowed_models = options.models
    if not options.models and not options.refuse_fields:
        return
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "The body must be sent without Content-Encoding.")
    if call.relay_only:
        check_charset(headers.get("content-type", ""))
    form = None if call.original_body else form_fields(call.raw_body, call.content_type)
    check_names(call.original_body or [name for name, _ in form or ()], options.refuse_fields)
    if options.models and MODEL_IN_PATH.intersection(call.path.split("/")):
        raise model_not_found("")
    if (
        call.original_body
    ):  # what was read is what is sent: of two "model" an upstream could take the other one
        call.raw_body = request_json(call.original_body, len(call.raw_body))
    elif form is not None:
        check_form_model(form, options.models)
        call.allowed_models = ()
    elif not options.models:
        raise APIError(415, "This key can send JSON and forms only.")


def check_form_model(form: List[Tuple[str, str]], models: Tuple[str, ...]) -> None:
    """Check the one model that a form names against the patterns of a key."""
    names = [value for name, value in form if name == "model"]
    if len(names) > 1 or any(name == "_charset_" for name, _ in form):
        raise bad_request("The form must have one field 'model', in UTF-8.", "model")
    if not model_allowed(models, "".join(names)):
        raise model_not_found("".join(names))


def form_fields(data: bytes, content_type: str) -> Optional[List[Tuple[str, str]]]:
    """Names and values of a form's fields, None if it is no form. Of a multipart form only the model's value is read."""
    media_type = content_type.partition(";")[0].strip(" \t").lower()
    if media_type == URLENCODED:
        return urlencoded_fields(data)
    return multipart_fields(data, content_type) if media_type == "multipart/form-data" else None


def urlencoded_fields(data: bytes) -> List[Tuple[str, str]]:
    """Names and values of the fields of application/x-www-form-urlencoded; APIError 400 if it is malformed."""
    if data.count(b"&") + data.count(b";") >= MAX_FORM_PARTS:
        raise bad_request("The form has too many fields.")
    fields = []
    try:
        for part in re.split(b"[&;]", data):
            name, _, value = part.partition(b"=")
            fields.append((percent_decoded(name), ""))
            if is_model_field(fields[-1][0]):
                fields[-1] = fields[-1][0], percent_decoded(value)
    except ValueError:
        raise bad_request("The form is malformed.") from None
    return fields


def percent_decoded(text: bytes) -> str:
    """A name or a short value of a form; ValueError if it is too long, or not UTF-8."""
    if len(text) > MAX_PART_HEAD:
        raise ValueError("too long")
    return urllib.parse.unquote_plus(text.decode("ascii"), errors="strict")


def multipart_fields(data: bytes, content_type: str) -> List[Tuple[str, str]]:
    """Names and values of the parts of a form (RFC 7578); APIError 400 if it is malformed.

    Wherever the boundary occurs a part must begin: else a lenient reader could find parts that we don't see.
    """
    match = _MULTIPART.fullmatch(content_type)
    if not match:
        raise bad_request("The boundary of the form is malformed.")
    delimiter, fields, at = b"--" + match[2].encode(), [], 0
    while data.startswith(delimiter + b"\r\n", at) and len(fields) < MAX_FORM_PARTS:
        start = at + len(delimiter) + 2
        end = data.find(b"\r\n\r\n", start, start + MAX_PART_HEAD)
        at = data.find(delimiter, start)
        if end < 0 or at < end + 6 or data[at - 2 : at] != b"\r\n":
            raise bad_request("A part of the form is malformed.")
        fields.append(part_field(data[start:end], data[end + 4 : min(at - 2, end + 5 + MAX_NAME)]))
    if not fields or data[at : at + len(delimiter) + 5] not in (
        delimiter + b"--\r\n",
        delimiter + b"--",
    ):
        raise bad_request("The form has no proper end, or too many parts.")
    return fields


def part_field(head: bytes, value: bytes) -> Tuple[str, str]:
    """Name and value of a part of a form; the value is "" unless it is the model. APIError 400 if it is malformed."""
    try:
        pairs = [parse_field.__wrapped__(line) for line in head.decode("latin-1").split("\r\n")]
        headers = dict(pairs)
        match = _DISPOSITION.fullmatch(
            headers.get("content-disposition", "").encode("latin-1").decode("utf-8")
        )
    except ValueError:
        match = None
    if not match or len(headers) < len(pairs):
        raise bad_request("The head of a part of the form is malformed.")
    name = match[1] if match[2] is None else match[2]
    if not is_model_field(name):
        return name, ""
    check_charset(headers.get("content-type", ""))
    text = value.decode("utf-8", "replace")
    is_plain = (
        headers.get("content-type", "text/plain").partition(";")[0].strip().lower() == "text/plain"
    )
    if (
        match[3]
        or match[4]
        or not is_plain
        or set(headers) - {"content-disposition", "content-type"}
        or (len(value) > MAX_NAME or not text.isprintable())
    ):
        raise bad_request("The model must be a plain text field of the form.", "model")
    return name, text


# == 10. loop =================================================================================
# One thread that owns every client socket, and the upstream socket of every relayed response.
# Knows no more of HTTP than message framing.


class Registration(NamedTuple):
    """Callbacks of a registered socket. Loop thread."""

    callback: Callable[[], None]  # the socket is ready
    abort: Callable[[], None]  # the callback has raised an exception


class EventLoop(threading.Thread):
    """The loop thread: dispatches I/O events, scheduled callbacks and a periodic tick.

    add(), modify() and remove(): loop thread. call_soon_threadsafe() and stop(): any thread.
    Callbacks must not block. An exception in a callback is logged and aborts its own socket only.
    """

    TICK = 0.25  # seconds between two calls of on_tick
    MAX_SELECT = 500  # sockets: select() on Windows takes 512, the others a descriptor below 1,024

    def __init__(
        self, on_tick: Callable[[float], None], selector: Optional[selectors.BaseSelector] = None
    ) -> None:
        super().__init__(name="akashproxy loop", daemon=True)
        self.on_tick = on_tick
        self.selector = selector or selectors.DefaultSelector()
        self.epoll: Any = None  # a second handle to the selector's epoll, for _select()
        if hasattr(select, "epoll") and isinstance(self.selector, selectors.EpollSelector):
            self.epoll = select.epoll.fromfd(os.dup(self.selector.fileno()))
        self.registrations: Dict[int, Registration] = {}  # by descriptor
        self.scheduled: Deque[Callable[[], Any]] = collections.deque()
        self.awake = False  # True: ``scheduled`` will be read before the next wait
        self.stopped = False
        self.now = time.monotonic()
        self.wakeup_r, self.wakeup_w = socket.socketpair()
        self.wakeup_r.setblocking(False)
        self.wakeup_w.setblocking(False)
        self.add(self.wakeup_r, self._on_wakeup, self._on_wakeup)

    def add(
        self,
        sock: Any,
        callback: Callable[[], None],
        abort: Callable[[], None],
        events: int = selectors.EVENT_READ,
    ) -> None:
        """Register a socket; OSError if select() has no room for it."""
        if isinstance(self.selector, selectors.SelectSelector) and (
            len(self.selector.get_map()) >= self.MAX_SELECT
            if os.name == "nt"
            else sock.fileno() >= 1024
        ):
            raise OSError(errno.EMFILE, "select() can't watch more sockets")
        self.selector.register(sock, events)
        self.registrations[sock.fileno()] = Registration(callback, abort)

    def modify(self, sock: Any, events: int) -> None:
        """Change the events of a registered socket."""
        self.selector.modify(sock, events)

    def remove(self, sock: Any) -> None:
        """Unregister a socket before it is closed or handed to a worker. Idempotent."""
        if self.registrations.pop(sock.fileno(), None) is not None:
            self.selector.unregister(sock)

    def call_soon_threadsafe(self, callback: Callable[[], Any]) -> None:
        """Schedule a callback for the loop thread. Any thread."""
        self.scheduled.append(callback)
        if not self.awake:  # two threads may both read False: the second byte is harmless
            self.awake = True
            # OSError: the pipe is full, so the loop will wake up; or the loop has been closed.
            with contextlib.suppress(OSError):
                self.wakeup_w.send(b"\0")

    def stop(self) -> None:
        """End the loop after its current iteration. Any thread."""
        self.stopped = True
        self.call_soon_threadsafe(bool)  # only to end its wait

    def run(self) -> None:
        next_tick = 0.0
        while not self.stopped:
            # Before ``scheduled`` is read. Otherwise: the loop reads an empty ``scheduled``; a
            # worker appends to it, sees awake and sends no byte; the loop waits for a whole tick.
            self.awake = False
            ready = self._select(0 if self.scheduled else self.TICK)
            self.awake = True
            self.now = time.monotonic()
            for registration in ready:
                try:
                    registration.callback()
                except Exception:
                    self._abort(registration)
            for _ in range(len(self.scheduled)):
                self._call(self.scheduled.popleft())
            if self.now >= next_tick:
                next_tick = self.now + self.TICK
                self._call(functools.partial(self.on_tick, self.now))
        self.close()

    def close(self) -> None:
        """Close the descriptors of a loop that has ended or was never started."""
        if self.epoll is not None:
            self.epoll.close()
        self.selector.close()
        self.wakeup_r.close()
        self.wakeup_w.close()

    def _select(self, seconds: float) -> List[Registration]:
        """Return the registrations whose sockets are ready within so many seconds.

        epoll is polled directly: through the selector a relayed token takes 4 % more CPU time.
        """
        try:
            if self.epoll is not None:
                return [
                    self.registrations[descriptor] for descriptor, _ in self.epoll.poll(seconds)
                ]
            return [self.registrations[key.fd] for key, _ in self.selector.select(seconds)]
        except (OSError, ValueError):  # select() fails as a whole for one invalid descriptor
            log.exception("the selector rejected its sockets")
            self._remove_invalid()
            return []

    def _remove_invalid(self) -> None:
        """Remove and abort the sockets that select() rejects."""
        for descriptor, registration in list(self.registrations.items()):
            try:
                select.select([descriptor], [], [], 0)
            except (OSError, ValueError):
                self.selector.unregister(descriptor)
                del self.registrations[descriptor]
                self._abort(registration)

    def _on_wakeup(self) -> None:
        try:
            self.wakeup_r.recv(4096)
        except BlockingIOError:
            return

    @staticmethod
    def _call(callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a bug in akashproxy, on the loop thread")

    @staticmethod
    def _abort(registration: Registration) -> None:
        log.exception("a bug in akashproxy, on the loop thread")
        try:
            registration.abort()
        except Exception:
            log.exception("the connection could not be closed properly")


class State(enum.Enum):
    """State of a client connection. Changed on the loop thread only.

    ::

        IDLE ──► READING                         first bytes of a request
        READING ──► DISPATCHED                   request complete or rejected: a worker has it
        DISPATCHED ──► STREAMING                 the loop relays an upstream's response
        STREAMING ──► DISPATCHED                 the upstream failed early: a worker fails over
        DISPATCHED, STREAMING ──► IDLE, READING  response sent
        DISPATCHED, STREAMING ──► LINGERING      response sent, input discarded until EOF
        any ──► CLOSED
    """

    IDLE = enum.auto()
    READING = enum.auto()
    DISPATCHED = enum.auto()
    STREAMING = enum.auto()
    LINGERING = enum.auto()
    CLOSED = enum.auto()


RESPONDING = (State.DISPATCHED, State.STREAMING)


class Head(NamedTuple):
    """Parsed request head. Any thread."""

    method: str = "-"
    path: str = "-"  # percent-decoded once
    query: str = ""
    http_minor: str = "1"
    headers: Dict[str, str] = {}  # by lower-case name


class Route(NamedTuple):
    """A row of ROUTES matched with a request. Any thread."""

    label: str = "other"  # in the metrics
    targets: Dict[str, Any] = {}  # {method: Dialect subclass, or function of a Handler}
    remainder: str = ""  # the part of the path that matched {}

    def target(self, method: str) -> Any:
        """Return the target of a method; None if it isn't allowed."""
        return self.targets.get("GET" if method == "HEAD" else method)

    def allow(self) -> str:
        """Return the value of the Allow header."""
        methods = [*self.targets, *(["HEAD"] if "GET" in self.targets else []), "OPTIONS"]
        return ", ".join(methods if self.targets else ["GET", "HEAD", "POST", "OPTIONS"])


class Request:
    """Request of a client, with its response.

    Loop thread while it is read and while its response is STREAMING; in between its worker thread.
    """

    def __init__(self, connection: "Connection") -> None:
        self.connection, self.server = connection, connection.server
        self.settings = connection.server.settings  # a reload must not change them midway
        self.id = "req_" + new_id()
        self.head = Head()
        self.body = b""
        self.body_unread = False
        self.keep_alive = False
        self.error: Optional[Exception] = None  # the reason to reject it
        self.started_at = time.monotonic()
        self.route = Route()
        self.key: Optional["KeyLimiter"] = None  # None: no token, or one of BEARER_TOKEN
        self.counted = False  # holds a slot of the key
        self.cancel_reason: Optional[Exception] = None
        self.call: Optional[Call] = None  # set for model calls and images
        self.exchange: Optional[Exchange] = None  # until the response is complete
        self.relay: Optional["StreamRelay"] = None  # while STREAMING
        self.record = AccessRecord()
        self.writer = ResponseWriter(self)

    def parse_head(self, head: bytes) -> None:
        """Parse and validate a request head; ProtocolError if it is malformed."""
        (method, path, query, http_minor), headers = parse_head(head, parse_request_line)
        self.head = Head(method, path, query, http_minor, headers)
        self.keep_alive = is_persistent(http_minor, headers)
        host = headers.get("host")
        if (host is None and http_minor == "1") or not _HOST.fullmatch(host or ""):
            raise ProtocolError("exactly one valid Host header is required")
        if "transfer-encoding" in headers and http_minor == "0":
            raise ProtocolError("Transfer-Encoding in HTTP/1.0")
        client_id = headers.get("x-request-id", "")
        if client_id and _REQUEST_ID.fullmatch(client_id):
            self.id = client_id

    def begin_call(self, call: Call) -> None:
        """Make a call cancellable; raises the reason if the request is already cancelled.

        This sets ``call``, then reads ``cancel_reason``; cancel() on the loop thread sets
        ``cancel_reason``, then reads ``call``. However they interleave, one of them sees the other.
        """
        self.call = call
        if self.cancel_reason is not None:
            raise self.cancel_reason

    def cancel(self, reason: Optional[Exception] = None) -> None:
        """Cancel the upstream exchange; a blocked worker raises the reason. Any thread."""
        self.cancel_reason = reason or ClientDisconnected("the client disconnected")
        if self.call is not None:  # in this order: see begin_call()
            self.call.cancel(self.cancel_reason)


class AccessRecord:
    """Values of a model call for the access log and the metrics. Owned as its Request."""

    __slots__ = ("controller", "first_token_at", "model", "usage")

    def __init__(self) -> None:
        self.model = self.controller = ""
        self.usage: Optional[Dict[str, int]] = None
        self.first_token_at = 0.0


class ByteBudget:
    """Memory limit for all request bodies in transit. Any thread."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self.limit, self.used = limit, 0
        self.lock = threading.Lock()

    def check(self, size: int) -> None:
        """Raise APIError 503 if the budget has no room for ``size`` bytes now."""
        if self.used + size > self.limit():
            raise APIError(
                503,
                "The server is receiving too many large requests; retry later.",
                code="overloaded",
                retry_after=1,
            )

    def reserve(self, size: int) -> None:
        """Take bytes from the budget; APIError 503 if it has no room for them."""
        with self.lock:
            self.check(size)
            self.used += size

    def release(self, size: int) -> None:
        with self.lock:
            self.used -= size


def check_body_size(size: int, settings: Settings) -> None:
    """Raise APIError 413 if a body of at least ``size`` bytes exceeds the limits."""
    limit = min(settings.max_body, settings.max_body_total)
    if size > limit:
        raise APIError(413, f"The body is larger than {limit} bytes.")


class BodyReader:
    """Collects a request body within limits of size, memory and rate. Loop thread.

    Each received byte extends the deadline by 1 / MIN_UPLOAD_RATE seconds, to at most BODY_TIMEOUT
    from now: otherwise a client could send a burst, then stall for as long as the burst has earned.
    """

    MIN_UPLOAD_RATE = 4000  # bytes per second

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.decoder, self.data = NO_BODY, bytearray()
        self.reserved = 0  # bytes of the server's ByteBudget
        self.deadline = math.inf

    def start(self, decoder: BodyDecoder, now: float) -> None:
        """Begin a body."""
        self.decoder = decoder
        self.deadline = now + self.server.settings.body_timeout

    def feed(self, data: bytes, now: float) -> None:
        """Decode received bytes; APIError 413 or 503 above a limit."""
        payload = self.decoder.feed(data)
        size = len(self.data) + len(payload) + self.decoder.remaining  # known so far, if chunked
        check_body_size(size, self.server.settings)
        if not self.decoder.done or self.data:  # a body that came with its head is not in transit
            self.server.bodies.reserve(len(payload))
            self.reserved += len(payload)
        self.data += payload
        self.deadline = min(
            self.deadline + len(data) / self.MIN_UPLOAD_RATE,
            now + self.server.settings.body_timeout,
        )

    def finish(self) -> Tuple[bytes, bytes]:
        """Return the body and the bytes received after it."""
        body, trailing_data = bytes(self.data), self.decoder.trailing_data
        self.discard()
        return body, trailing_data

    def discard(self) -> None:
        """Drop the body and return its bytes to the budget."""
        self.decoder, self.data = NO_BODY, bytearray()
        if self.reserved:
            self.server.bodies.release(self.reserved)
            self.reserved = 0


class Connection:
    """A client socket with its buffers, deadline and state. Loop thread, unless noted.

    A complete request goes to a worker; the next one is parsed after its response has been sent.
    """

    HIGH_WATER = 1 << 18  # bytes of output above which wait_for_room() blocks
    LINGER_SECONDS = 2.0
    LINGER_BYTES = 4 << 20

    def __init__(self, sock: socket.socket, client_address: Any, server: "Server") -> None:
        self.sock, self.client_address = sock, client_address
        self.server, self.loop = server, server.loop
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)  # a client that does not read must not block the loop
        self.state = State.IDLE
        self.input = bytearray()  # received, not yet parsed
        self.output = bytearray()  # to be sent
        self.room = threading.Condition()  # guards ``output`` and CLOSED; notified by each flush()
        self.scan_from = 0  # the part of ``input`` before it does not contain the head's end
        self.body = BodyReader(server)
        self.request: Optional[Request] = None  # being read or answered
        self.on_drained: Optional[Callable[[], None]] = None  # called once all output is sent
        self.pipelined = False  # a second request has come, so readability no longer reveals EOF
        self.events = 0  # registered with the loop
        self.linger_budget = 0
        self.deadline, self.timeout_message = math.inf, ""
        self._update_events()

    # -- reading

    def on_ready(self) -> None:
        """Handle a readable or writable socket."""
        if self.state is not State.CLOSED and self.output:
            self.flush()
        if self.request is not None and self.state in RESPONDING:
            self._check_disconnect(self.request)
        elif self.state is not State.CLOSED:  # else a callback of the same select() has closed it
            self._receive()

    def _receive(self) -> None:
        try:
            data = self.sock.recv(RECV_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.state is State.LINGERING:
            self.linger_budget -= len(data)
            if not data or self.linger_budget <= 0:
                self.close()
        elif data:
            if self.state is State.IDLE:
                self._begin_reading()
            self.input += data
            self._advance()
        elif self.input or self.request is not None:
            part = "head" if self.request is None else "body"
            self._dispatch(ProtocolError(f"the connection ended within a {part}"))
        else:
            self.close()

    def _begin_reading(self) -> None:
        self.state = State.READING
        timeout = self.server.settings.head_timeout
        self.set_deadline(timeout, "The request's head took too long.")

    def _advance(self) -> None:
        """Parse ``input``: head, gate, body; then dispatch the request to a worker."""
        try:
            request = self.request or self._read_head()
            if request is not None and self._read_body(request):
                self._dispatch()
        except (ProtocolError, APIError) as error:
            self._dispatch(error)

    def _read_head(self) -> Optional[Request]:
        """Parse the head and pass it through the gate; None while it is incomplete."""
        if self.input.startswith(b"\r\n"):  # RFC 9112, 2.2: skip empty lines before a request
            blank = _BLANK_LINES.match(self.input)
            del self.input[: blank.end() if blank else 0]
        end = find_head_end(self.input, self.scan_from) if self.input else -1
        if end < 0:
            self.scan_from = max(0, len(self.input) - 3)
            return None
        self.scan_from = 0
        self.request = request = Request(self)
        head = bytes(self.input[:end])
        del self.input[: end + 4]
        request.parse_head(head)
        decoder = BodyDecoder(request.head.headers)
        request.body_unread = not decoder.done
        self.server.gate.check_head(request, decoder)
        self.body.start(decoder, self.loop.now)
        if request.head.headers.get("expect") and not decoder.done and not self.input:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.deadline = math.inf
        return request

    def _read_body(self, request: Request) -> bool:
        """Read the body; True if it is complete or need not be read."""
        reader = self.body
        if not request.body_unread:
            return True
        if self.input:
            data, self.input = bytes(self.input), bytearray()
            reader.feed(data, self.loop.now)
        if not reader.decoder.done:
            if request.head.method in BODILESS_METHODS:
                return True  # not needed; the connection is closed after the response
            self.deadline = reader.deadline
            self.timeout_message = "The request's body took too long."
            return False
        request.body, trailing_data = reader.finish()
        self.input = bytearray(trailing_data)
        request.body_unread = False
        return True

    def _dispatch(self, error: Optional[Exception] = None) -> None:
        """Hand the request to a worker, with the reason if it is rejected."""
        request = self.request = self.request or Request(self)
        if error is not None:
            if isinstance(error, ProtocolError) or not request.head.headers:
                request.body_unread = True  # the start of a next request can't be determined
            self.body.discard()
        request.error = error
        self.state, self.deadline = State.DISPATCHED, math.inf
        self.submit(request, functools.partial(self.server.serve_request, request))

    def submit(self, request: Request, task: Callable[[], None]) -> None:
        """Run a step of the request on a worker; reject or disconnect without one."""
        try:
            self.server.submit(task)
        except RuntimeError as error:  # the system allows no more threads
            if report_exhaustion():
                log.error("cannot handle a request: %s", error)
            if request.writer.status:
                self.disconnect()
            else:
                self.reject()
            self.end_request()

    def reject(self) -> None:
        """Send 503 and close: the server has no room for this client."""
        if self.send(TOO_MANY_CLIENTS):
            self._linger()

    def _check_disconnect(self, request: Request) -> None:
        """Handle input during a response: EOF, or the beginning of the next request."""
        data = peek(self.sock)
        if data == b"" and request.error is None:  # a rejected client may have half-closed before
            self.disconnect()
        elif data is not None:
            self.pipelined = True
            self._update_events()

    # -- writing

    def send(self, data: bytes, last: bool = False) -> bool:
        """Send at once and buffer the remainder; True if there is none."""
        if self.output:
            with self.room:
                self.output += data
            return self.flush()
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.disconnect()
            return False
        if sent == len(data):
            return True
        with self.room:
            self.output += data[sent:]
        self._start_write_timeout()
        return False

    def enqueue(self, data: bytes, last: bool = False) -> None:
        """Buffer output for the loop; ClientDisconnected if closed. Any thread.

        With ``last``, end_request() sends it: flush() would be a second callback for the loop.
        """
        with self.room:
            if self.state is State.CLOSED:
                raise ClientDisconnected("the client disconnected")
            first = not self.output
            self.output += data
        if first and not last:
            self.loop.call_soon_threadsafe(self.flush)

    def wait_for_room(self) -> None:
        """Block while output is above HIGH_WATER. Worker thread.

        Raises ClientDisconnected if the connection is closed.
        """
        with self.room:
            self.room.wait_for(
                lambda: len(self.output) < self.HIGH_WATER or self.state is State.CLOSED
            )
            if self.state is State.CLOSED:
                raise ClientDisconnected("the client disconnected")

    def flush(self) -> bool:
        """Send buffered output; True if nothing is left."""
        if self.state is State.CLOSED:
            return False
        try:
            with self.room:
                del self.output[: self.sock.send(self.output)]
                self.room.notify_all()
        except BlockingIOError:
            pass
        except OSError:
            self.disconnect()
            return False
        if self.output:
            self._start_write_timeout()
            return False
        self.deadline = math.inf
        if self.events != selectors.EVENT_READ:
            self._update_events()
        if self.on_drained is not None:
            callback, self.on_drained = self.on_drained, None
            callback()
        return True

    def _start_write_timeout(self) -> None:
        """Restart the write timeout: it bounds a stall, not the whole response."""
        timeout = self.server.settings.write_timeout
        self.set_deadline(timeout, "The client did not read its response.")
        self._update_events()

    # -- ending a request, and the connection

    def end_request(self) -> None:
        """Log a complete response; then read the next request, linger or close."""
        request = self.request
        if request is None:
            return
        if self.output and not self.flush() and self.state is not State.CLOSED:
            self.on_drained = self.end_request
            return
        self.request = None
        if request.exchange is not None:
            request.exchange.close()
        self.server.on_request_end(request)
        if self.state is State.CLOSED:
            self.server.on_connection_closed(self)
        elif self.state is State.LINGERING:
            return
        elif request.body_unread:
            self._linger()
        elif request.keep_alive:
            self._next_request()
        else:
            self.close()

    def _next_request(self) -> None:
        self.pipelined = False
        if self.input:
            self._begin_reading()
            self._advance()
        else:
            self.state = State.IDLE
            self.set_deadline(self.server.settings.keepalive_timeout, "")
        self._update_events()

    def _linger(self) -> None:
        """Half-close, then discard input for a while (lingering close, RFC 9112, 9.6).

        Closing with unread input sends a reset, which can destroy the response in transit.
        """
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.state, self.pipelined, self.linger_budget = State.LINGERING, False, self.LINGER_BYTES
        self.set_deadline(self.LINGER_SECONDS, "")
        self._update_events()

    def stop(self) -> None:
        """End the connection on shutdown; its request is cancelled with an error 503."""
        error = APIError(503, "The server is stopping.", code="stopping")
        if self.request is not None:
            self.request.cancel(error)
        if self.state is State.READING:
            self._dispatch(error)
        elif self.state is State.IDLE:
            self.close()

    def disconnect(self) -> None:
        """Close, and cancel the request: the client has disconnected or must be dropped."""
        request, responding, on_drained = self.request, self.state in RESPONDING, self.on_drained
        self.close()
        if request is None or not responding:
            return
        if request.relay is not None:
            request.relay.on_client_disconnect()
        elif on_drained is not None:  # end_request() has been waiting for the output to be sent
            self.end_request()
        request.cancel()

    def close(self) -> None:
        """Close the socket. A worker's request is logged when the worker ends it."""
        if self.state is State.CLOSED:
            return
        was_reading = self.state in (State.IDLE, State.READING)
        self.body.discard()
        with self.room:
            self.state = State.CLOSED
            self.output.clear()
            self.room.notify_all()
        self.deadline, self.on_drained = math.inf, None
        self.loop.remove(self.sock)
        self.server.shutdown_request(self.sock)
        if was_reading:
            self.request = None
        if self.request is None:
            self.server.on_connection_closed(self)

    # -- time

    def set_deadline(self, seconds: float, message: str) -> None:
        """Set the deadline, in seconds from now, and the message of its error 408."""
        self.deadline, self.timeout_message = self.loop.now + seconds, message

    def on_tick(self, now: float) -> None:
        """Enforce the deadline, detect a disconnected client, send pings."""
        request = self.request
        if self.state is State.IDLE and self.server.draining:
            self.deadline = min(self.deadline, now + LAME_DUCK_SECONDS)
        if now >= self.deadline:
            if self.state is State.READING and (self.input or request is not None):
                self._dispatch(APIError(408, self.timeout_message))
            elif self.state in RESPONDING:
                self.disconnect()
            else:
                self.close()
        elif request is not None and self.state in RESPONDING:
            if self.pipelined and request.error is None and peer_has_closed(self.sock):
                self.disconnect()
            else:
                request.writer.on_tick(now)

    def _update_events(self) -> None:
        """Register the events of interest; a selector rejects an empty set."""
        events = (0 if self.pipelined else selectors.EVENT_READ) | (
            selectors.EVENT_WRITE if self.output else 0
        )
        if events == self.events or self.state is State.CLOSED:
            return
        if not self.events:
            self.loop.add(self.sock, self.on_ready, self.disconnect, events)
        elif events:
            self.loop.modify(self.sock, events)
        else:
            self.loop.remove(self.sock)
        self.events = events


# == 11. relay ================================================================================
# Writes responses to clients. Knows no upstreams' formats.


class ResponseWriter:
    """Writes one response: status line, headers, framing.

    Any thread: the request's worker; the loop while STREAMING, and for pings. The lock prevents a
    ping in the middle of what a worker is writing. The head is sent with the body's first bytes.
    """

    def __init__(self, request: "Request") -> None:
        self.request, self.connection = request, request.connection
        self.lock = threading.RLock()
        self.send: Callable[..., Any] = self.connection.enqueue  # Connection.send while STREAMING
        self.status = 0  # 0: not started
        self.finished = self.chunked = False
        self.head = b""  # not sent yet
        self.bytes_sent = 0  # of the body
        self.tail = b"\n\n"  # last bytes of the body
        self.last_write = request.started_at
        self.ping_frame: Optional[Callable[[str], bytes]] = None  # None: pings are not possible

    def start(self, status: int, headers: Dict[str, str], length: Optional[int] = None) -> None:
        """Begin the response; its body is chunked without a length.

        HTTP/1.0 has no chunks: there the end of the connection ends the body.
        """
        request = self.request
        if request.body_unread or request.server.draining:
            request.keep_alive = False
        self.status = status
        self.chunked = length is None and request.head.http_minor == "1"
        values = "".join(headers.values())
        if not values.isprintable() or not values.isascii():
            headers = {name: _UNPRINTABLE.sub("?", value) for name, value in headers.items()}
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        framing = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        if length is not None and status != 204:
            framing = f"Content-Length: {length}\r\n"
        elif length is None and not self.chunked:
            request.keep_alive = False
        if not request.keep_alive:
            framing += "Connection: close\r\n"
        elif request.head.http_minor == "0":
            framing += "Connection: keep-alive\r\n"
        status_line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} "
        self.head = (
            f"{status_line}\r\n{server_date_headers(int(time.time()))}{fields}{framing}"
            f"x-request-id: {request.id}\r\n{cors_headers(request)}\r\n"
        ).encode("ascii")

    def write(self, data: bytes) -> Any:
        """Write a part of the body; returns and raises what ``send`` does."""
        with self.lock:
            self.last_write = self.connection.loop.now
            return self.send(self._frame(data))

    def write_chunk(self, frame: bytes) -> bool:
        """Write complete frames to a chunked stream that has begun. Loop thread."""
        self.bytes_sent += len(frame)
        self.tail, self.last_write = frame, self.connection.loop.now
        return self.connection.send(b"%x\r\n%b\r\n" % (len(frame), frame))

    def finish(self, data: bytes = b"") -> Any:
        """Write the last part of the body, and end it."""
        with self.lock:
            # Before the end is sent. Otherwise: the client reads the end and sends its next
            # request; that is rejected by max_concurrency; this request releases its slot.
            release_key(self.request)
            self.ping_frame, self.finished = None, True
            end = b"0\r\n\r\n" if self.chunked and self.request.head.method != "HEAD" else b""
            return self.send(self._frame(data) + end, last=True)

    def respond(self, status: int, data: bytes, headers: Dict[str, str]) -> None:
        """Write a complete response."""
        with self.lock:
            self.start(status, headers, length=len(data))
            self.finish(data)

    def break_off(self) -> None:
        """End a body that can't carry an error: no last chunk marks it incomplete."""
        self.request.keep_alive, self.chunked = False, False
        self.finish()

    def on_tick(self, now: float) -> None:
        """Send a ping if the stream is idle, so that no proxy times it out. Loop thread."""
        heartbeat = self.request.settings.heartbeat
        if (
            self.ping_frame is None
            or now - self.last_write <= heartbeat
            or not self.lock.acquire(blocking=False)
        ):
            return  # the worker that holds the lock is writing: no ping is needed
        try:
            if self.ping_frame is None or now - self.last_write <= heartbeat:
                return  # a worker wrote or finished between the check above and acquire()
            self.last_write = now
            frame = self.ping_frame(self.request.settings.pings)
            if (
                frame
                and not self.connection.output
                and self.tail.endswith((b"\n\n", b"\r\n\r\n", b"\n\r\n"))
            ):
                if not self.status:
                    self.start(200, SSE_HEADERS)
                self.send(self._frame(frame))
        except ClientDisconnected:
            self.request.cancel()
        finally:
            self.lock.release()

    def _frame(self, data: bytes) -> bytes:
        """Frame a part of the body, and prepend the head to the first one."""
        if data:
            self.bytes_sent += len(data)
            self.tail = data if len(data) > 3 else (self.tail + data)[-4:]
            if self.request.head.method == "HEAD":
                data = b""
            elif self.chunked:  # only if there is data: a chunk of length 0 would end the body
                data = b"%x\r\n%b\r\n" % (len(data), data)
        if self.head:
            data, self.head = self.head + data, b""
        return data


class StreamRelay:
    """Relays one response: upstream -> decoder -> dialect -> client. Loop thread.

    A client that reads slowly pauses its upstream (back-pressure). After the response is complete
    the client may send its next request, while the upstream's message is read to its end: only then
    can the upstream connection be reused.
    """

    def __init__(self, responder: "CallResponder") -> None:
        self.responder, self.request, self.call = responder, responder.request, responder.call
        self.exchange, self.dialect = responder.exchange, responder.dialect
        self.writer, self.connection = responder.writer, responder.request.connection
        self.loop = self.connection.loop
        self.stream: EventStream = self.exchange.response
        self.upstream, self.scope = self.stream.response.sock, self.stream.response.scope
        self.tls_pending = getattr(self.upstream, "pending", None)  # bytes decrypted but not read
        self.paused = self.client_done = self.upstream_done = False
        self.fast_path: Any = None  # unframe, parse, encode; (): impossible; None: not known yet
        self.buffered: List[Event] = []  # of a response that is not streamed
        if not self.call.stream:
            self.stream.byte_budget = MAX_BUFFERED_BODY

    def start(self) -> None:
        """Take over from the worker that has sent the request to the upstream."""
        if self.upstream.gettimeout() != 0:
            self.upstream.setblocking(False)
        if self.connection.state is State.CLOSED:
            self.on_client_disconnect()
            return
        self.connection.state, self.request.relay = State.STREAMING, self
        self.writer.send = self.connection.send
        self._add_upstream()

    def on_upstream(self) -> None:
        """Handle a readable upstream socket."""
        self._step()
        while (
            self.tls_pending and not self.upstream_done and not self.paused and self.tls_pending()
        ):
            self._step()  # decrypted bytes don't make the socket readable again

    def on_client_disconnect(self) -> None:
        """Release the upstream after the client has disconnected."""
        self.client_done = True
        self._release()
        self.loop.call_soon_threadsafe(self.connection.end_request)

    def abort(self) -> None:
        """Close the upstream, and the client if it still waits, after a bug."""
        client_waiting = not self.client_done
        self.client_done = True
        self._release()
        if client_waiting:
            self.connection.disconnect()
            self.connection.end_request()

    def _step(self) -> None:
        """Read once from the upstream and write once to the client."""
        stream = self.stream
        try:
            data = self.upstream.recv(RECV_SIZE)
            if self.fast_path and self._relay_token(data):
                return
            events = stream.receive(data)
        except (BlockingIOError, WantRead):
            return
        except OSError as error:
            events = stream.on_network_error(error)
        if events and not self.client_done:
            self._deliver(events)
        if stream.error:
            self._fail(stream.error)
        elif stream.at_eof:
            self._finish()
        elif stream.started and not self.paused:
            deadline = self.loop.now + stream.response.timeouts.idle
            self.scope.deadline = (
                min(deadline, self.scope.deadline) if stream.complete else deadline
            )

    def _relay_token(self, data: bytes) -> bool:
        """Relay one chunk that holds one token, without events; False if it doesn't.

        Nearly every read of a live stream is such a chunk; this saves a quarter of its CPU time.
        """
        unframe, parse, encode = self.fast_path
        payload = unframe(data)
        token = payload and parse(payload)
        if not token:
            return False
        self.scope.deadline = self.loop.now + self.stream.response.timeouts.idle
        if not self.writer.write_chunk(encode(token)):
            self._pause()
        return True

    def _choose_fast_path(self) -> None:
        body, decoder = self.stream.response.body, self.stream.decoder
        parse = getattr(decoder, "fast_path", None)
        encode = self.dialect.text_frame if self.call.relay_content_type is None else bytes
        usable = parse and encode and body.chunked and self.writer.chunked
        self.fast_path = (body.single_chunk, parse, encode) if usable else ()

    def _deliver(self, events: List[Event]) -> None:
        """Send events to the client, or buffer them for a response that is not streamed."""
        if self.exchange.committed:
            frames = self.dialect.encode(events)
        elif self._is_buffered():
            self.buffered += events
            return
        else:
            frames = self.responder.start_stream() + self.dialect.encode(events)
        if not self.stream.complete:
            if not self.writer.write(frames):
                self._pause()
            if self.fast_path is None and self.stream.started:
                self._choose_fast_path()
        else:
            self.request.record.usage = getattr(events[-1], "usage", None)
            self._end_response(frames)

    def _is_buffered(self) -> bool:
        if not self.call.stream:
            return True
        return self.call.relay_content_type is not None and isinstance(
            self.stream.decoder, BufferedBody
        )

    def _end_response(self, frames: bytes) -> None:
        """Send the last frames, and let the connection read its next request."""
        self.client_done, self.fast_path = True, ()
        self.writer.finish(frames)
        self.request.relay = self.request.exchange = None
        self.connection.end_request()

    def _finish(self) -> None:
        """Handle the end of the upstream's message."""
        frames = b""
        if self.buffered:
            frames = self.responder.start_buffered(self.buffered)
        elif not self.exchange.committed:
            frames = self.responder.start_stream()
        # Before the response ends, so that the client's next request finds the upstream free.
        self._release()
        if not self.client_done:
            self._end_response(frames)

    def _fail(self, error: Exception) -> None:
        """Fail over on a worker, or after the first event send an error frame."""
        if self.client_done or not isinstance(error, APIError):
            self._release()
            if not self.client_done:
                self.connection.disconnect()
        elif self.exchange.committed:
            frames = self.responder.error_trailer(error)
            self._release(error)
            self._end_response(frames)
        else:
            self.upstream_done = True
            self.loop.remove(self.upstream)
            self.request.relay, self.connection.state = None, State.DISPATCHED
            self.writer.send = self.connection.enqueue
            task = functools.partial(self.responder.fail_over, error)
            self.connection.submit(self.request, task)

    def _pause(self) -> None:
        """Stop reading from the upstream until all output is sent to the client."""
        if not self.paused and not self.client_done:
            self.paused = True
            self.scope.deadline = math.inf
            self.loop.remove(self.upstream)
            self.connection.on_drained = self._resume

    def _resume(self) -> None:
        self.paused = False
        if not self.upstream_done:
            self.stream.response.reset_idle_deadline(self.stream.started)
            self._add_upstream()

    def _add_upstream(self) -> None:
        self.loop.add(self.upstream, self.on_upstream, self.abort)
        if self.tls_pending and self.tls_pending():
            self.on_upstream()

    def _release(self, error: Optional[APIError] = None) -> None:
        """Return or close the upstream connection, and record its result. Idempotent."""
        if not self.upstream_done:
            self.upstream_done = True
            self.loop.remove(self.upstream)
            self.exchange.close(error)


# == 12. limits ===============================================================================
# Limits of client keys, and metrics for Prometheus.


class KeyLimiter:
    """Enforces the limits of a client key. Any thread. acquire() needs a release()."""

    def __init__(
        self, options: ClientKeySettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.options, self.name, self.clock = options, options.name, clock
        self.lock = threading.Lock()
        self.in_flight = self.requests = self.rejected = 0
        # GCRA's theoretical arrival time: each request adds 60 / requests_per_minute seconds, and
        # it may be up to a minute ahead of the clock.
        self.next_free = 0.0

    def acquire(self, count: int = 1) -> None:
        """Take one slot and ``count`` requests.

        Raises APIError 429, or 400 if ``count`` exceeds a whole minute's limit.
        """
        concurrency, rate = self.options.max_concurrency, self.options.requests_per_minute
        if count > rate > 0:
            raise bad_request(
                f"'n' must be at most {rate}: the limit of the key {self.name!r} is "
                f"{rate} per minute.",
                "n",
            )
        with self.lock:
            now = self.clock()
            next_free = max(self.next_free, now) + (60 * count / rate if rate else 0)
            if concurrency and self.in_flight >= concurrency:
                raise self._reject(f"{concurrency} at a time", 1.0)
            if rate and next_free - now > 60.001:
                raise self._reject(f"{rate} per minute", next_free - now - 60)
            self.next_free = next_free
            self.in_flight += 1
            self.requests += count

    def _reject(self, limit: str, seconds: float) -> APIError:
        self.rejected += 1
        return APIError(
            429,
            f"Too many requests: the limit of the key {self.name!r} is {limit}.",
            retry_after=seconds,
        )

    def release(self) -> None:
        with self.lock:
            self.in_flight -= 1

    def status(self) -> Dict[str, Any]:
        """Return the key's entry in /status."""
        return {
            "name": self.name,
            "in_flight": self.in_flight,
            "requests": self.requests,
            "refused": self.rejected,
        }


# {name: (type, help, labels)}. Label values come from ROUTES and the settings, never from requests:
# clients could otherwise create any number of series.
METRICS: Dict[str, Tuple[str, str, Tuple[str, ...]]] = {
    "akashproxy_requests_total": (
        "counter",
        "Completed requests.",
        ("route", "status", "controller"),
    ),
    "akashproxy_requests_in_flight": (
        "gauge",
        "Model calls and images in progress.",
        (),
    ),
    "akashproxy_request_duration_seconds": (
        "histogram",
        "Time from the first byte of a model call to the end of its response.",
        ("controller",),
    ),
    "akashproxy_time_to_first_token_seconds": (
        "histogram",
        "Time from the first byte of a model call to the first event of its stream.",
        ("controller",),
    ),
    "akashproxy_prompt_tokens_total": (
        "counter",
        "Prompt tokens, where upstreams report them.",
        ("controller",),
    ),
    "akashproxy_completion_tokens_total": (
        "counter",
        "Completion tokens, where upstreams report them.",
        ("controller",),
    ),
    "akashproxy_failovers_total": (
        "counter",
        "Failovers to another controller.",
        (),
    ),
    "akashproxy_controller_rests_total": (
        "counter",
        "Cool-downs of a controller.",
        ("controller",),
    ),
    "akashproxy_controller_resting": (
        "gauge",
        "1 while a controller is cooling down.",
        ("controller",),
    ),
    "akashproxy_session_renewals_total": (
        "counter",
        "Sessions obtained from Akash Chat.",
        ("controller",),
    ),
    "akashproxy_key_requests_total": ("counter", "Model calls of a key.", ("key",)),
    "akashproxy_key_refused_total": (
        "counter",
        "Model calls rejected by the limits of a key.",
        ("key",),
    ),
    "akashproxy_key_in_flight": ("gauge", "Model calls of a key in progress.", ("key",)),
    "akashproxy_sent_bytes_total": ("counter", "Bytes sent in response bodies.", ()),
    "akashproxy_open_connections": ("gauge", "Open client connections.", ()),
    "akashproxy_build_info": ("gauge", "Always 1.", ("version", "python")),
    "process_cpu_seconds_total": ("counter", "CPU time, user and system.", ()),
    "process_start_time_seconds": ("gauge", "Start time, in seconds since 1970.", ()),
}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)  # seconds; then infinity


class Metrics:
    """Counters and histograms for /metrics. Any thread."""

    def __init__(self, server: "Server") -> None:
        self.server, self.started_at, self.lock = server, time.time(), threading.Lock()
        self.counts: Dict[Tuple[Any, ...], float] = defaultdict(  # {(name, label, ...): number}
            int, {(name,): 0 for name, (_, _, labels) in METRICS.items() if not labels}
        )

    def add(self, request: "Request", now: float) -> None:
        """Count a completed request."""
        record, call, writer, counts = request.record, request.call, request.writer, self.counts
        controller, usage = record.controller, record.usage
        with self.lock:
            counts[
                "akashproxy_requests_total", request.route.label, writer.status or 499, controller
            ] += 1
            counts["akashproxy_sent_bytes_total",] += writer.bytes_sent
            if call is None:
                return
            self.observe(
                "akashproxy_request_duration_seconds", controller, now - request.started_at
            )
            if len(call.attempts) > 1:
                counts["akashproxy_failovers_total",] += len(call.attempts) - 1
            if call.stream and controller and is_event_stream(call.relay_content_type):
                self.observe(
                    "akashproxy_time_to_first_token_seconds",
                    controller,
                    record.first_token_at - request.started_at,
                )
            if usage:
                for kind in ("prompt", "completion"):
                    tokens = max(0, usage.get(f"{kind}_tokens") or 0)
                    counts[f"akashproxy_{kind}_tokens_total", controller] += tokens

    def observe(self, name: str, controller: str, seconds: float) -> None:
        """Add a duration to a histogram. The caller holds the lock."""
        self.counts[name, controller, bisect.bisect_left(BUCKETS, seconds)] += 1
        self.counts[name, controller, "sum"] += seconds

    def snapshot(self) -> Dict[Tuple[Any, ...], float]:
        """Return all metrics: {(name, label, ...): number}."""
        server, connections = self.server, self.server.connections.copy()
        with self.lock:
            metrics = dict(self.counts)
        metrics["akashproxy_requests_in_flight",] = server.running_calls()
        metrics["akashproxy_open_connections",] = len(connections)
        for upstream in server.pool.upstreams:
            metrics["akashproxy_controller_rests_total", upstream.name] = upstream.cooldown_count
            metrics["akashproxy_controller_resting", upstream.name] = int(
                upstream.cooldown_until > server.pool.clock()
            )
            for name, value in upstream.controller.metrics().items():
                metrics[name, upstream.name] = value
        for key in server.keys:
            metrics["akashproxy_key_requests_total", key.name] = key.requests
            metrics["akashproxy_key_refused_total", key.name] = key.rejected
            metrics["akashproxy_key_in_flight", key.name] = key.in_flight
        metrics["akashproxy_build_info", __version__, "%d.%d.%d" % sys.version_info[:3]] = 1
        metrics["process_cpu_seconds_total",] = time.process_time()
        metrics["process_start_time_seconds",] = self.started_at
        return metrics


def prometheus_text(metrics: Dict[Tuple[Any, ...], float]) -> bytes:
    """Format metrics as Prometheus' text format (0.0.4)."""
    series: Dict[str, Dict[Tuple[str, ...], float]] = {name: {} for name in METRICS}
    for (name, *labels), value in metrics.items():
        series[name][tuple(map(str, labels))] = value
    lines = []
    for name, (kind, help, names) in METRICS.items():
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        if kind != "histogram":
            lines += [
                sample(name, zip(names, key), value) for key, value in sorted(series[name].items())
            ]
            continue
        histograms: Dict[Tuple[str, ...], Dict[str, float]] = {}
        for key, value in sorted(series[name].items()):
            histograms.setdefault(key[:-1], {})[key[-1]] = value
        for key, buckets in histograms.items():
            lines += histogram_lines(name, list(zip(names, key)), buckets)
    return "\n".join([*lines, ""]).encode()


def histogram_lines(
    name: str, labels: List[Tuple[str, str]], buckets: Dict[str, float]
) -> Iterator[str]:
    """Yield the sample lines of one histogram; its buckets are cumulative."""
    count: float = 0
    for index, bound in enumerate([*map(str, BUCKETS), "+Inf"]):
        count += buckets.get(str(index), 0)
        yield sample(f"{name}_bucket", [*labels, ("le", bound)], count)
    yield sample(f"{name}_sum", labels, buckets["sum"])
    yield sample(f"{name}_count", labels, count)


def sample(name: str, labels: Iterable[Tuple[str, str]], value: float) -> str:
    """Format one sample line."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    text = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in labels)
    return f"{name}{{{text}}} {value}" if text else f"{name} {value}"


# == 13. server ===============================================================================
# http.server's classes, on the event loop. Knows no upstreams.

# Paths that need no token: a browser sends none with an address that was typed in. The page holds
# no secrets, and its own API requests carry the token.
PUBLIC_PATHS = ("/", "/health")

BODILESS_METHODS = ("GET", "HEAD", "OPTIONS", "DELETE")  # their bodies are not read

SERVER_NAME = f"akashproxy/{__version__}"
CORS_ANY = (
    "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: "
    "x-request-id, retry-after, x-should-retry, x-akashproxy-ignored, x-akashproxy-route\r\n"
)
_UNPRINTABLE = re.compile(r"[^ -~]")  # not allowed in a header
_STATUS_LINES = {int(status): f"HTTP/1.1 {status:d} {status.phrase}" for status in http.HTTPStatus}

# Request headers that a relayed request keeps; all others stay here, tokens and cookies above all.
FORWARDED_HEADERS = frozenset(("accept", "openai-beta", "anthropic-version", "anthropic-beta"))

LAME_DUCK_SECONDS = 1.0  # idle connections stay open on shutdown, for requests in transit

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


def is_event_stream(content_type: Optional[str]) -> bool:
    """Return whether a stream's response is SSE. None: it is encoded here, so it is."""
    return content_type is None or content_type.startswith("text/event-stream")


@functools.lru_cache(maxsize=2)
def server_date_headers(second: int) -> str:
    """Return the Server and Date headers for a Unix time."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
    return f"Server: {SERVER_NAME}\r\nDate: {date}\r\n"


# -- the gate: tokens, origins, hosts

_AUTHORITY = re.compile(r"[a-z0-9._:\[\]-]+")


class Gate:
    """Decides by a request's head whether it is served. Loop thread.

    check_head() runs before a byte of the body is buffered. It sets the request's route and key,
    and raises the APIError of a rejected request.
    """

    def __init__(self, server: "Server") -> None:
        self.server = server

    def check_head(self, request: Request, decoder: BodyDecoder) -> None:
        """Check origin, token, route, method and declared size."""
        head = request.head
        request.route = route = find_route(head.method, head.path)
        self.check_page(request)
        if head.method == "OPTIONS":  # a preflight carries no token
            return
        public_metrics = head.path == "/metrics" and request.settings.metrics == "public"
        if head.path not in PUBLIC_PATHS and not public_metrics:
            self.authorize(request)
        if self._is_overridden(head.method):
            return
        if not route.targets:
            raise APIError(404, f"There is no {head.path[:200]!r} here.", code="not_found")
        if route.target(head.method) is None:
            raise APIError(405, f"{head.method} is not allowed here.", code="method_not_allowed")
        if head.method not in BODILESS_METHODS:
            self._check_body(request, decoder)

    def _check_body(self, request: Request, decoder: BodyDecoder) -> None:
        """Check the declared size and Expect; APIError 413, 417 or 503."""
        head = request.head
        check_body_size(decoder.remaining, request.settings)
        if (
            request.body_unread
            and head.http_minor == "1"
            and head.headers.get("expect", "100-continue").lower() != "100-continue"
        ):
            raise APIError(417, "Only 'Expect: 100-continue' is supported.")
        # A declared length is compared with the budget but not taken from it: otherwise clients
        # that declare much and send nothing would lock out all others.
        if decoder.remaining > len(request.connection.input):
            self.server.bodies.check(decoder.remaining)

    def _is_overridden(self, method: str) -> bool:
        """Return whether a handler subclass handles the method, on paths of its own."""
        do_method = getattr(self.server.RequestHandlerClass, "do_" + method, None)
        return do_method is not None and do_method is not getattr(Handler, "do_" + method, None)

    def check_page(self, request: Request) -> None:
        """Reject browser requests from foreign pages; APIError 403.

        Any page can send requests from its visitor's browser. Without a token, only Origin and Host
        distinguish them from requests of other clients; a token is sufficient proof.
        """
        settings, headers = request.settings, request.head.headers
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin and not origin_allowed(
            origin, host, settings.public_url, settings.cors_origins, settings.needs_token()
        ):
            raise APIError(
                403,
                f"Pages from the origin {origin[:200]!r} may not use this server. Allowed origins "
                "are listed in CORS_ORIGINS.",
                code="origin_not_allowed",
                retry=False,
            )
        if (
            self.server.is_loopback
            and not settings.needs_token()
            and not (is_local(host) or host_allowed(host, settings.host_names()))
        ):
            raise APIError(
                403,
                f"The host name {host[:200]!r} is not allowed. Set PUBLIC_URL to allow it, or "
                "BEARER_TOKEN to allow any.",
                code="host_not_allowed",
                retry=False,
            )

    def authorize(self, request: Request) -> None:
        """Check the token, and set the request's key; APIError 401."""
        if not request.settings.needs_token():
            return
        headers, tokens = request.head.headers, request.settings.bearer_token
        scheme, *credentials = headers.get("authorization", "").split(None, 1) or [""]
        bearer = credentials if scheme.lower() == "bearer" else []
        # Imported here: it loads OpenSSL's hashes, which a server without tokens does not need.
        from hmac import compare_digest

        # Any accepted token is sufficient. All are compared, and in constant time, so that the
        # response time reveals nothing about them.
        sent = [
            text.encode("utf-8", "replace")
            for text in (*bearer, headers.get("x-api-key", ""), headers.get("api-key", ""))
            if text
        ]
        keys = [
            key
            for data in sent
            for key in self.server.keys
            if compare_digest(data, key.options.key.encode())
        ]
        accepted = [
            token for data in sent for token in tokens if compare_digest(data, token.encode())
        ]
        request.key = keys[0] if keys else None
        if not keys and not accepted:
            raise APIError(
                401,
                "Incorrect API key provided: this server does not know the token."
                if sent
                else "A token is needed: send it as 'Authorization: Bearer TOKEN'.",
            )


def acquire_key(request: Request, call: Call) -> None:
    """Apply the limits of the request's key to a call; APIError 429. Worker thread."""
    key = request.key
    if key is None:
        return
    n = (call.original_body or {}).get("n") if call.path.startswith("/v1/images/") else None
    key.acquire(call.image_count or (n if type(n) is int and n > 0 else 1))
    request.counted = True
    call.one_image_at_a_time = key.options.max_concurrency > 0
    apply_key_limits(call, key.options, request.head.headers)


def release_key(request: Request) -> None:
    """Release the key's slot, if the request holds one. Idempotent. Any thread."""
    if request.counted and request.key is not None:
        request.counted = False
        request.key.release()


def cors_headers(request: Request) -> str:
    """Return the headers that let pages of allowed origins read the response."""
    settings, headers = request.settings, request.head.headers
    if "*" in settings.cors_origins or not settings.cors_origins and settings.needs_token():
        return CORS_ANY
    origin = headers.get("origin", "")
    if origin and origin_allowed(
        origin, headers.get("host", ""), settings.public_url, settings.cors_origins, False
    ):
        return f"Vary: Origin\r\n{CORS_ANY.replace('*', origin)}"
    return "Vary: Origin\r\n"


def host_of(authority: str) -> str:
    """Return the host of HOST[:PORT] in lower case, with the brackets of IPv6."""
    host, colon, port = authority.lower().rpartition(":")
    return host if colon and port.isdigit() else authority.lower()


def is_local(authority: str) -> bool:
    """Return whether a host is localhost, a subdomain of it, or a loopback address."""
    host = host_of(authority)
    if host in ("localhost", "127.0.0.1", "[::1]"):  # a short cut for nearly all requests
        return True
    if not _AUTHORITY.fullmatch(host):
        return False
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_allowed(authority: str, own: Iterable[str]) -> bool:
    """Return whether a server on loopback accepts a Host that is not local.

    DNS rebinding: a page's domain is made to resolve to 127.0.0.1, so its requests are same-origin
    and only Host shows the foreign domain. Accepted are ``own``, the configured names, and names
    without a dot, which no public domain is.
    """
    host = host_of(authority)
    return "." not in host and ":" not in host or host in own


def origin_allowed(
    origin: str, host: str, public_url: str, allowed_origins: Tuple[str, ...], needs_token: bool
) -> bool:
    """Return whether pages of an origin may use the server.

    Its own page and CORS_ORIGINS may. If that is empty: all origins if a token is required,
    otherwise those of this machine.
    """
    scheme, _, authority = origin.lower().partition("://")
    is_web = scheme in ("http", "https")
    if (
        is_web
        and host
        and authority == host.lower()
        or public_url
        and origin.lower() == origin_of(public_url)
    ):
        return True
    if allowed_origins:
        return "*" in allowed_origins or origin in allowed_origins
    return needs_token or is_web and is_local(authority)


def origin_of(url: str) -> str:
    """Return the origin of an http(s) URL."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


class ResponseFile(io.RawIOBase):
    """A handler's ``wfile``: write() sends a part of the response body. Worker thread."""

    def __init__(self, writer: ResponseWriter) -> None:
        super().__init__()
        self.writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.writer.write(bytes(data))
        self.writer.connection.wait_for_room()
        return len(data)


class CallResponder:
    """Responds to a model call in the client's dialect, with failover.

    Worker thread; loop thread while a StreamRelay has the response.
    """

    def __init__(
        self,
        request: Request,
        exchange: Exchange,
        dialect: Any,
        run: Callable[[Callable[[], Any]], None],
    ) -> None:
        self.request, self.exchange, self.dialect, self.run = request, exchange, dialect, run
        self.writer, self.call = request.writer, exchange.call
        connection = request.connection
        self.call.wake = functools.partial(connection.loop.call_soon_threadsafe, self._wake)
        self.call.client_has_left = functools.partial(peer_has_closed, connection.sock)
        if self.call.stream:
            self.writer.ping_frame = dialect.ping_frame

    def attempt(self) -> bool:
        """Try controllers until one responds. Worker thread.

        Returns True if the response goes on elsewhere (relayed by the loop, or the call is queued),
        False if it is complete; raises APIError if no controller responds.
        """
        exchange = self.exchange
        try:
            relayed = exchange.attempt()
        except Queued:
            return True  # _wake() continues
        if relayed:
            relay = StreamRelay(self)
            # Last: from here on the request belongs to the loop, which may already be relaying.
            relay.loop.call_soon_threadsafe(relay.start)
            return True
        try:
            self._drain(exchange.events())
        except APIError as error:
            if not exchange.committed:
                exchange.fail_over(error)
                return self.attempt()
            self.writer.finish(self.error_trailer(error))
            exchange.close(error)
        return False

    def fail_over(self, error: APIError) -> None:
        """Try the next controller after one failed before its first event. Worker thread."""

        def step() -> bool:
            self.exchange.fail_over(error)
            return self.attempt()

        self.run(step)

    def _wake(self) -> None:
        """Continue a call that has left the pool's queue, on a worker. Loop thread."""
        task = functools.partial(self.run, self.attempt)
        self.request.connection.submit(self.request, task)

    def start_stream(self) -> bytes:
        """Begin a streamed response; returns its opening frames."""
        self._commit()
        content_type = self.call.relay_content_type
        with self.writer.lock:
            if not self.writer.status:  # else a ping has begun it
                headers = dict(SSE_HEADERS) if is_event_stream(content_type) else {}
                if content_type:
                    headers["Content-Type"] = content_type
                self.writer.start(self.call.relay_status, {**headers, **call_headers(self.call)})
        return b"" if content_type else self.dialect.opening_frames()

    def start_buffered(self, events: List[Event]) -> bytes:
        """Begin a response that is not streamed; returns its body."""
        self._commit()
        content_type = self.call.relay_content_type
        if content_type is None:
            answer = fold(events)
            self.request.record.usage = answer.finish.usage if answer.finish else None
            content_type, data = "application/json", to_json(self.dialect.response_body(answer))
        else:
            data = b"".join([event.data for event in events if isinstance(event, RawBytes)])
        self.writer.start(
            self.call.relay_status,
            {"Content-Type": content_type, **call_headers(self.call)},
            length=len(data),
        )
        return data

    def error_trailer(self, error: APIError) -> bytes:
        """Return the frames that end a response with an error; b"" if its format has none."""
        log.warning("%s: broken off: %s", self.request.id, error.message)
        if is_event_stream(self.call.relay_content_type):
            frames: bytes = self.dialect.error_frames(error)
            return frames
        # Without its last chunk the client can see that the body is incomplete.
        self.request.keep_alive = self.writer.chunked = False
        return b""

    def _drain(self, events: Iterator[Event]) -> None:
        """Write the events of a blocking generator. Worker thread."""
        if not self.call.stream:
            body = self.start_buffered(list(events))
            self.exchange.close()
            self.writer.finish(body)
            return
        first = next(events)
        frames = self.start_stream()
        for event in itertools.chain([first], events):
            frames += self.dialect.encode([event])
            if isinstance(event, Finish):
                self.request.record.usage = event.usage
                break
            self.writer.write(frames)
            self.writer.connection.wait_for_room()
            frames = b""
        self.writer.finish(frames)

    def _commit(self) -> None:
        self.exchange.commit()
        record = self.request.record
        record.first_token_at, record.controller = time.monotonic(), self.call.answered_by


def call_headers(call: Call) -> Dict[str, str]:
    """Return the headers that list a call's attempts and ignored parameters."""
    headers = {"X-Akashproxy-Route": ", ".join(call.attempts)} if call.attempts else {}
    ignored = call.ignored_params + (call.untranslated if call.relay_content_type is None else [])
    names = [
        name for name in dict.fromkeys(ignored[:100]) if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)
    ]
    return {**headers, "X-Akashproxy-Ignored": ", ".join(names[:20])} if names else headers


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles one request, as a handler of http.server. Worker thread.

    A subclass may define do_GET() etc. and use send_response(), send_header(), end_headers(),
    send_error(), rfile and wfile. Differences from http.server:

    - a handler is created for each complete request, not for each connection;
    - ``request`` is a Request and ``headers`` a Headers;
    - the response body is framed here: chunked unless a Content-Length is sent;
    - errors are sent in the client's dialect, also by send_error();
    - a do_ method that returns True has left the rest of the response to the loop.
    """

    server: "Server"
    server_version = SERVER_NAME
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.connection = self.request.connection
        self.dialect: Any = Dialect  # a class, until the body is parsed

    def handle(self) -> None:
        self.run(self.handle_one_request)

    def finish(self) -> None:
        """Do nothing: the loop sends the output, wfile needs no flush."""

    # Created on first use: most requests need none of them.

    @functools.cached_property
    def rfile(self) -> Any:  # type: ignore[override]
        """The request body as a file."""
        return io.BytesIO(self.request.body)

    @functools.cached_property
    def wfile(self) -> Any:  # type: ignore[override]
        """The response body as a file."""
        return ResponseFile(self.request.writer)

    @functools.cached_property
    def headers(self) -> Any:  # type: ignore[override]
        """The request headers."""
        return Headers(self.request.head.headers)

    def run(self, step: Callable[[], Any]) -> None:
        """Run a step and send the error it raises; end the request unless it returns True."""
        continues = False
        try:
            continues = bool(step())
        except APIError as error:
            self.send_api_error(error)
        except ClientDisconnected:
            pass  # the access log says 499
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            self.send_api_error(
                APIError(500, "Internal error. The log has the details.", retry=False)
            )
        if not continues:
            self.server.loop.call_soon_threadsafe(self.request.connection.end_request)

    def handle_one_request(self) -> Any:
        self.parse_request()
        method = getattr(self, "do_" + self.command, None)
        result = method() if method else self.dispatch()
        if not result and not self.request.writer.status:
            raise APIError(500, f"{type(self).__name__}.do_{self.command} sent no response.")
        if not result and not self.request.writer.finished:
            self.request.writer.finish()
        return result

    def parse_request(self) -> bool:
        """Set the attributes from the parsed head; APIError if the request was rejected."""
        request = self.request
        self.command, self.path, self.query, http_minor, headers = request.head
        self.request_version = f"HTTP/1.{http_minor}"
        self.requestline = f"{self.command} {self.path} {self.request_version}"
        target = request.route.targets.get("POST")
        if isinstance(target, type):
            self.dialect = target
        elif "anthropic-version" in headers:
            self.dialect = Messages
        if isinstance(request.error, ProtocolError):
            raise APIError(request.error.status, f"Bad request: {request.error}.")
        if request.error is not None:
            raise request.error
        return True

    def do_GET(self) -> Any:
        return self.dispatch()

    do_HEAD = do_POST = do_DELETE = do_GET

    def do_OPTIONS(self) -> None:
        """Send the allowed methods; in a CORS preflight, allow the requested headers, too."""
        allow = self.request.route.allow()
        headers = {"Allow": allow}
        if "access-control-request-method" in self.headers:
            requested = self.headers.get("access-control-request-headers", "")
            names = [
                name
                for name in re.split(r"[\s,]+", requested)
                if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name)
            ]
            headers.update(
                {"Access-Control-Allow-Methods": allow, "Access-Control-Max-Age": "86400"}
            )
            if names:
                headers["Access-Control-Allow-Headers"] = ", ".join(names)
        self.request.writer.respond(204, b"", headers)

    def dispatch(self) -> Any:
        """Call the route's function, or respond to a model call; returns as do_GET()."""
        target = self.request.route.target(self.command)
        if target is None:  # the gate leaves the paths to a subclass, which calls super().do_GET()
            raise APIError(404, f"There is no {self.path[:200]!r} here.", code="not_found")
        if not isinstance(target, type):
            return target(self)
        dialect, request = self.parse_call(target), self.request
        request.record.model = dialect.call.model
        request.begin_call(dialect.call)
        acquire_key(request, dialect.call)
        self.dialect = dialect
        request.exchange = Exchange(self.server.pool, dialect.call)
        return CallResponder(request, request.exchange, dialect, self.run).attempt()

    def parse_call(self, dialect_class: Any) -> Any:
        """Parse the body into a dialect with its call; APIError 400 if it is invalid."""
        headers = self.request.head.headers
        data, content_type = self.request.body, headers.get("content-type", "")
        try:
            if dialect_class is Passthrough:
                dialect = Passthrough(data, content_type)
            else:
                dialect = dialect_class(from_json(data), self.base_url())
        except ValueError as error:
            raise bad_request(f"The body is not valid JSON: {error}.") from None
        dialect.prepare()
        call = dialect.call
        call.path, call.raw_body = self.path, data
        query = remove_model_params(self.query) if self.query else ""
        if query:
            call.query = "?" + query
        call.headers = {
            name.title(): headers[name] for name in FORWARDED_HEADERS.intersection(headers)
        }
        if call.original_body:
            check_names(call.original_body)
            if has_escaped_letters(data):
                call.raw_body = request_json(call.original_body, len(data))
        return dialect

    def base_url(self) -> str:
        """Return this server's URL as the client knows it."""
        host = self.request.head.headers.get("host")
        return self.request.settings.public_url or (f"http://{host}" if host else self.server.url)

    # -- responses

    def send_response(self, code: int, message: Optional[str] = None) -> None:
        """Begin a response; ``message`` is ignored, the standard phrase is sent."""
        self.response: Tuple[int, List[Tuple[str, str]]] = int(code), []

    def send_header(self, keyword: str, value: Any) -> None:
        """Add a header; ValueError if it contains CR, LF or NUL (header injection)."""
        if re.search("[\r\n\0]", f"{keyword}{value}"):
            raise ValueError("a header must not contain CR, LF or NUL")
        self.response[1].append((keyword, str(value)))

    def end_headers(self) -> None:
        """Begin the body, which is chunked without a Content-Length."""
        status, fields = self.response
        lengths = [int(value) for name, value in fields if name.lower() == "content-length"]
        headers = {
            name: value
            for name, value in fields
            if name.lower() not in ("content-length", "connection")
        }
        no_body = status in (204, 304) or status < 200
        self.request.writer.start(
            status, headers, length=lengths[0] if lengths else 0 if no_body else None
        )

    def send_error(
        self, code: int, message: Optional[str] = None, explain: Optional[str] = None
    ) -> None:
        """Send an error in the client's dialect."""
        text = message or http.HTTPStatus(code).phrase
        self.send_api_error(APIError(code, f"{text}: {explain}" if explain else text))

    def send_json(self, status: int, value: Any, headers: Optional[Dict[str, str]] = None) -> None:
        self.request.writer.respond(
            status, to_json(value), {"Content-Type": "application/json", **(headers or {})}
        )

    def send_api_error(self, error: APIError) -> None:
        """Send an error in the client's dialect, also at the end of a stream."""
        writer, call = self.request.writer, self.request.call
        parsed = isinstance(self.dialect, Dialect)
        with writer.lock, contextlib.suppress(ClientDisconnected):
            if writer.status and parsed:  # pings have been sent
                writer.finish(self.dialect.error_frames(error))
            elif writer.status:
                writer.break_off()
            elif parsed and self.dialect.local_response() is not None:
                self.send_json(200, self.dialect.local_response())
            else:
                headers = error.headers()
                if error.status == 405:
                    headers["Allow"] = self.request.route.allow()
                if call is not None:
                    headers.update(call_headers(call))
                self.send_json(self.dialect.status(error), self.dialect.error_body(error), headers)

    def log_message(self, format: str, *args: Any) -> None:
        log.info(format, *args)


# -- targets of ROUTES


def get_page(handler: Handler) -> None:
    """Send the chat page."""
    if handler.request.settings.page == "off":
        raise APIError(404, "The page is turned off.", code="not_found")
    handler.request.writer.respond(200, *page())


HEALTHY = to_json({"status": "ok", "message": "akashproxy is running"})


def get_health(handler: Handler) -> None:
    """Send 200, or 503 while the server is stopping, for load balancers."""
    if handler.server.draining:
        handler.send_json(
            503, {"status": "draining", "message": "akashproxy is stopping"}, {"Retry-After": "5"}
        )
    else:
        handler.request.writer.respond(200, HEALTHY, {"Content-Type": "application/json"})


def get_status(handler: Handler) -> None:
    """Send the status of controllers and keys."""
    server = handler.server
    handler.send_json(
        200,
        {
            "status": "draining" if server.draining else "ok",
            "message": "akashproxy is running",
            "version": __version__,
            "uptime_seconds": int(time.monotonic() - server.started_at),
            "controllers": server.pool.status(),
            "keys": [key.status() for key in server.keys],
        },
    )


def get_metrics(handler: Handler) -> None:
    """Send the metrics."""
    if handler.request.settings.metrics == "off":
        raise APIError(404, "Metrics are turned off.", code="not_found")
    handler.request.writer.respond(
        200,
        prometheus_text(handler.server.metrics.snapshot()),
        {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


def models_of_key(handler: Handler) -> List[Dict[str, Any]]:
    """Return the models that the client's key may use."""
    patterns = handler.request.key.options.models if handler.request.key is not None else ()
    return [model for model in handler.server.pool.models() if model_allowed(patterns, model["id"])]


def get_models(handler: Handler) -> None:
    """Send the list of models."""
    handler.send_json(200, handler.dialect.model_list(models_of_key(handler)))


def get_model(handler: Handler) -> None:
    """Send one model of the list; APIError 404."""
    requested = handler.request.route.remainder
    name = handler.server.pool.resolve_alias(requested)
    for model in models_of_key(handler):
        if model["id"] == name:
            handler.send_json(200, handler.dialect.model_object({**model, "id": requested}))
            return
    raise model_not_found(requested)


def get_response(handler: Handler) -> None:
    """Raise the APIError 404 of stored responses: none are stored."""
    raise APIError(404, "Responses are not stored here.", code="not_found")


def get_image(handler: Handler) -> None:
    """Relay an image; the upstream itself lets no other origin embed it."""
    request, writer = handler.request, handler.request.writer
    if not IMAGE_NAME.fullmatch(request.route.remainder):
        raise APIError(404, "The image does not exist.", code="not_found")
    call = Call({"model": "image"})
    request.begin_call(call)
    response = handler.server.pool.image(request.route.remainder, call.scope)
    # private if there are tokens: a shared cache would serve the image without one
    cacheability = "private" if request.settings.needs_token() else "public"
    try:
        writer.start(
            200,
            {
                "Content-Type": response.headers["content-type"],
                "Cache-Control": f"{cacheability}, max-age=31536000, immutable",
                "Content-Security-Policy": "sandbox; default-src 'none'",
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "cross-origin",
            },
        )
        for data in response.iter_bytes() if handler.command == "GET" else ():
            handler.wfile.write(data)
        writer.finish()
    except APIError as error:
        log.warning("%s: an image broke off: %s", request.id, error.message)
        writer.break_off()
    finally:
        response.close()


# {path: {method: Dialect subclass, or function of a Handler}}. {} matches the path's remainder.
ROUTES: Dict[str, Dict[str, Any]] = {
    "/v1/chat/completions": {"POST": ChatCompletions},
    "/v1/completions": {"POST": Completions},
    "/v1/images/generations": {"POST": Images},
    "/v1/messages": {"POST": Messages},
    "/v1/messages/count_tokens": {"POST": CountTokens},
    "/v1/responses": {"POST": Responses},
    "/v1/responses/{}": {"GET": get_response, "DELETE": get_response},
    "/v1/models": {"GET": get_models},
    "/v1/models/{}": {"GET": get_model},
    "/images/{}": {"GET": get_image},
    "/": {"GET": get_page},
    "/health": {"GET": get_health},
    "/status": {"GET": get_status},
    "/metrics": {"GET": get_metrics},
}


def find_route(method: str, path: str) -> Route:
    """Return the route of a request; it has no targets if the path is unknown."""
    targets = ROUTES.get(path)
    if targets and "{}" not in path:
        return Route(path, targets)
    if method == "POST" and Passthrough.PATH.fullmatch(path):
        return Route("relayed", {"POST": Passthrough})
    for pattern, targets in ROUTES.items():
        prefix, braces, _ = pattern.partition("{}")
        if braces and path.startswith(prefix) and len(path) > len(prefix):
            return Route(pattern, targets, path[len(prefix) :])
    return Route()


# -- the log

_NOT_ASCII = re.compile("[^ -~]+")


def escape_match(match: "re.Match[str]") -> str:
    """Escape the unprintable characters of a match."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in match[0]
    )


class LogFormat(logging.Formatter):
    """Formats log lines as text or JSON. Any thread.

    Unprintable characters are escaped, so that a client can't forge log lines.
    """

    def __init__(self, style: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.style = style

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _NOT_ASCII.sub(escape_match, shorten(record.message, 4000))
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self.style == "text":
            return text
        facts = getattr(record, "facts", None) or {"message": text.split(" ", 3)[3]}
        return _encode(
            {"time": self.formatTime(record), "level": record.levelname.lower(), **facts}
        )


# -- the server

_FULL = to_json(
    Dialect.error_body(APIError(503, "Too many clients are connected.", code="overloaded"))
)
TOO_MANY_CLIENTS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class WorkerPool:
    """Worker threads: each task gets an idle or a new one. Any thread."""

    MAX_IDLE = 32

    def __init__(self) -> None:
        self.queue: SimpleQueue[Optional[Callable[[], None]]] = SimpleQueue()
        self.idle = 0  # threads that wait for a task, minus tasks in the queue
        self.stopped = False
        self.lock = threading.Lock()

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task on a thread; RuntimeError if the system allows no more threads."""
        with self.lock:
            has_idle, self.idle = self.idle > 0, max(0, self.idle - 1)
        if not has_idle:
            threading.Thread(target=self._run, name="akashproxy worker", daemon=True).start()
        self.queue.put(task)

    def stop(self) -> None:
        """End idle threads now, busy ones after their task."""
        with self.lock:
            self.stopped = True
            for _ in range(self.idle):
                self.queue.put(None)

    def _run(self) -> None:
        while True:
            task = self.queue.get()
            if task is None:
                return
            try:
                task()
            except Exception:
                log.exception("a bug in akashproxy, on a worker thread")
            del task  # an idle thread must not keep its last request alive
            with self.lock:
                if self.stopped or self.idle >= self.MAX_IDLE:
                    return
                self.idle += 1


class Server(http.server.ThreadingHTTPServer):
    """The proxy server. ``Server(settings).start()`` serves until stop().

    As with http.server, ``Server((host, port), MyHandler).serve_forever()`` blocks until shutdown()
    and finish_request(), verify_request() and handle_error() may be overridden; ``with Server()``
    starts and stops it. Differences from http.server: process_request() creates a Connection, not a
    thread, and a handler handles one request, not one connection. Any thread, unless noted.
    """

    request_queue_size = 1024

    def __init__(
        self,
        settings: Any = None,
        RequestHandlerClass: Any = Handler,
        bind_and_activate: bool = True,
    ) -> None:
        if isinstance(settings, tuple):
            settings = Settings(server_address=join_address(*settings[:2]))
        self.settings: Settings = settings or Settings()
        self.pool = Pool(self.settings)
        self.loop = EventLoop(self.on_tick)
        self.workers = WorkerPool()
        self.metrics = Metrics(self)
        self.keys = key_limiters(self.settings, [])
        self.gate = Gate(self)
        self.bodies = ByteBudget(lambda: self.settings.max_body_total)
        self.connections: Set[Connection] = set()  # changed on the loop thread only
        self.all_closed = threading.Condition()  # notified while draining, once per connection
        self.draining = self.accept_paused = False
        self.accepting_stopped = threading.Event()
        self.started_at = time.monotonic()
        self.lock = threading.Lock()
        host, port = split_address(self.settings.server_address)
        self.address_family, host = _family(host, port)
        try:
            super().__init__((host, port), RequestHandlerClass, bind_and_activate)
        except OSError as error:
            raise ConfigError(
                [f"cannot listen on {self.settings.server_address}: {error.strerror or error}"]
            ) from None

    @property
    def url(self) -> str:
        """The base URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(self.server_name, self.server_name)
        return "http://" + join_address(host, self.server_port)

    # -- methods of http.server

    def server_bind(self) -> None:
        """Bind, without the library's reverse lookup; [::] accepts IPv4, too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setblocking(False)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.is_loopback = ipaddress.ip_address(self.server_name).is_loopback

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until another thread calls shutdown(). ``poll_interval`` is ignored."""
        self.start()
        self.loop.join()

    def shutdown(self) -> None:
        """Stop serve_forever(), as stop() does."""
        self.stop()

    def server_close(self) -> None:
        """Close the listening socket and the idle connections to upstreams."""
        self.socket.close()
        self.pool.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Add a client connection; reject it above MAX_CONNECTIONS. Loop thread."""
        connection = Connection(request, client_address, self)
        self.connections.add(connection)
        connection.set_deadline(self.settings.keepalive_timeout, "")
        if len(self.connections) > self.settings.max_connections:
            connection.reject()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the traceback of an exception in a handler. Worker thread."""
        log.exception("%s: a bug in akashproxy", getattr(request, "id", client_address))

    # -- running

    def start(self) -> "Server":
        """Start the loop thread."""
        self.loop.add(self.socket, self.on_connection, self.on_connection)
        self.loop.start()
        return self

    def stop(self, grace: Optional[float] = None) -> None:
        """Stop accepting, and give requests ``grace`` seconds to end."""
        grace = self.settings.grace if grace is None else grace
        with self.lock:
            first, self.draining = not self.draining, True
        if not self.loop.is_alive():
            self.stop_accepting()
        elif first:
            self.loop.call_soon_threadsafe(self.stop_accepting)
        # Also in a second stop(). Otherwise: the first one schedules stop_accepting(); the second
        # one finds no connection and ends the loop; clients in the backlog are never accepted.
        self.accepting_stopped.wait()
        if not self.idle(grace):
            self.loop.call_soon_threadsafe(functools.partial(self._for_each, Connection.stop))
            if not self.idle(1.0):
                disconnect_all = functools.partial(self._for_each, Connection.disconnect)
                self.loop.call_soon_threadsafe(disconnect_all)
                self.idle(1.0)
        self.workers.stop()
        self.loop.stop()
        self.pool.close()

    def idle(self, seconds: float) -> bool:
        """Wait until no client is connected; False after so many seconds."""
        with self.all_closed:
            return self.all_closed.wait_for(lambda: not self.connections, seconds)

    def running_calls(self) -> int:
        """Return the number of model calls and images in progress."""
        requests = [connection.request for connection in self.connections.copy()]
        return sum(request is not None and request.call is not None for request in requests)

    def reload(self, settings: Settings) -> None:
        """Replace all settings but the address; running requests keep the old ones."""
        if settings.server_address != self.settings.server_address:
            log.warning("the address remains %s until a restart", self.settings.server_address)
        previous = self.pool
        self.pool, self.keys, self.settings = (
            Pool(settings, previous),
            key_limiters(settings, self.keys),
            settings,
        )
        previous.close(keep=self.pool.upstreams)

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _for_each(self, action: Callable[[Connection], None]) -> None:
        for connection in self.connections.copy():
            action(connection)

    # -- callbacks

    def on_connection(self) -> None:
        """Handle a readable listening socket. Loop thread."""
        try:
            self.accept_ready(64)  # bounded, so that a burst does not delay other connections
        except OSError as error:  # out of descriptors; on_tick() resumes
            log.error("cannot accept a connection: %s", error)
            self.loop.remove(self.socket)
            self.accept_paused = True

    def accept_ready(self, limit: int) -> None:
        """Accept up to ``limit`` pending connections. Loop thread."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(limit):
                request, address = self.get_request()
                try:
                    if self.verify_request(request, address):
                        self.process_request(request, address)
                    else:
                        self.shutdown_request(request)
                except Exception as error:
                    is_bug = not isinstance(error, OSError)
                    log.error("a connection could not be accepted: %s", error, exc_info=is_bug)
                    request.close()

    def stop_accepting(self) -> None:
        """Accept the kernel's backlog, then close the listening socket. Loop thread.

        Closing it with a backlog would reset those connections.
        """
        self.loop.remove(self.socket)
        with contextlib.suppress(OSError):
            self.accept_ready(self.request_queue_size)
        self.socket.close()
        self.accepting_stopped.set()

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task on a worker thread; RuntimeError if there is none."""
        self.workers.submit(task)

    def serve_request(self, request: Any) -> None:
        """Handle a Request by an instance of the handler class. Worker thread."""
        try:
            self.finish_request(request, request.connection.client_address)
        except Exception:
            self.handle_error(request, request.connection.client_address)
            self.loop.call_soon_threadsafe(request.connection.disconnect)

    def on_request_end(self, request: Request) -> None:
        """Count and log a completed request. Loop thread."""
        release_key(request)
        now = time.monotonic()
        self.metrics.add(request, now)
        if log.isEnabledFor(logging.INFO):
            log_access(request, now)

    def on_connection_closed(self, connection: Connection) -> None:
        """Remove a connection after its last request has ended. Loop thread."""
        self.connections.discard(connection)
        if self.draining:
            with self.all_closed:
                self.all_closed.notify_all()

    def on_tick(self, now: float) -> None:
        """Enforce all deadlines, resume accepting, wake queued calls. Loop thread."""
        for scope in CancelScope.active.copy():
            if scope.deadline < now:
                scope.cancel(
                    APIError(504, scope.timeout_message, code="timeout", category="network")
                )
        for connection in self.connections.copy():
            try:
                connection.on_tick(now)
            except Exception:
                log.exception("a bug in akashproxy, on the loop thread")
                connection.disconnect()
        if self.accept_paused and not self.draining:
            self.accept_paused = False
            self.loop.add(self.socket, self.on_connection, self.on_connection)
        self.pool.close_expired(now)
        self.wake_waiters()

    def wake_waiters(self) -> None:
        """Resume up to 32 calls queued for a controller, the others later. Loop thread.

        1,500 calls that time out at once would otherwise block the loop.
        """
        if self.pool.wake_waiters(32):
            self.loop.call_soon_threadsafe(self.wake_waiters)


def key_limiters(settings: Settings, previous: List[KeyLimiter]) -> List[KeyLimiter]:
    """Return the limiters of all keys; a key that keeps its name keeps its counts."""
    by_name = {key.name: key for key in previous}
    keys = []
    for options in settings.keys:
        key = by_name.get(options.name) or KeyLimiter(options)
        key.options = options
        keys.append(key)
    return keys


def log_access(request: Request, now: float) -> None:
    """Write a request's line of the access log."""
    record, usage, writer = request.record, request.record.usage or {}, request.writer
    started_at = request.started_at
    facts = {
        "client": request.connection.client_address[0],
        "key": request.key.name if request.key else "",
        "method": request.head.method,
        "path": shorten(request.head.path),
        "status": writer.status or 499,
        "model": shorten(record.model),
        "controller": record.controller,
        "first_ms": round((record.first_token_at or now) * 1000) - round(started_at * 1000),
        "ms": round((now - started_at) * 1000),
        "bytes": writer.bytes_sent,
        "tokens_in": usage.get("prompt_tokens"),
        "tokens_out": usage.get("completion_tokens"),
        "id": request.id,
    }
    log.info(
        " ".join(f"{name}={value}" for name, value in facts.items() if value not in ("", None)),
        extra={"facts": facts},
    )


def join_address(host: str, port: int) -> str:
    """Format HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str, port: int) -> Tuple[int, str]:
    """Return the address family and numeric host to bind to; "": all interfaces."""
    if not host:
        return (
            (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ConfigError([f"cannot listen on {host}: no such host"]) from None
    return family, str(address[0])


# == 14. demo =================================================================================
# A stand-in for Akash Chat on a loopback port, for --demo: no model, but the real wire format.


class DemoAkash(http.server.BaseHTTPRequestHandler):
    """Akash Chat's API in small: session, model list, streamed chat, image jobs.

    Any thread: a ThreadingHTTPServer of its own creates one handler for each connection.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    COOKIE = "session_token=" + "0123456789abcdef" * 4
    jobs: Dict[str, int] = {}  # number of status requests, by job
    delay = 0.03  # seconds between two words

    @classmethod
    def start(cls) -> str:
        """Start a server thread; returns its base URL."""
        server = DemoServer(("127.0.0.1", 0), cls)
        threading.Thread(target=server.serve_forever, name="akashproxy demo", daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/api/auth/session/":
            cookie = f"{self.COOKIE}; Path=/; Max-Age=600; Secure; HttpOnly"
            self._send(200, b'{"success":true}', headers={"Set-Cookie": cookie})
        elif path == "/api/models/":
            models = [{"id": id, "name": id, "available": True} for id in ("demo", "AkashGen")]
            self._send(200, to_json(models))
        elif path == "/api/image-status/":
            self._send(200, to_json([self._image_status(query.partition("=")[2])]))
        elif path.startswith("/api/image/job_"):
            self._send(200, demo_image(path), headers={"Content-Type": "image/png"})
        else:
            self._send(404, b"{}")

    def _image_status(self, job: str) -> Dict[str, Any]:
        """Return the next status of an image job: waiting twice, pending, succeeded."""
        self.jobs[job] = count = self.jobs.get(job, 0) + 1
        return {
            "job_id": job,
            "status": "waiting" if count < 3 else "pending" if count == 3 else "succeeded",
            "queue_position": max(0, 3 - count),
            "result": f"/api/image/job_{job[:8]}_00001_.png" if count > 3 else None,
        }

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/api/chat/" or self.COOKIE not in self.headers.get("Cookie", ""):
            self._send(403, b'{"success":false,"message":"Unauthorized: Invalid session"}')
            return
        prompt = body["messages"][-1]["content"]
        if body["model"] == "AkashGen":
            escaped = prompt.replace("'", "\\'")
            attributes = f"jobId='{new_id()[:16]}' prompt='{escaped}' negative=''"
            line = f'0:"<image_generation> {attributes}</image_generation>"\n'
            self._stream([line.encode()], 0)
            return
        words = re.findall(
            r"\S+\s*",
            f'You asked {body["model"]}: "{prompt}" This is the demo: no model has read it, '
            "but each word of this answer took the same path as a real one.",
        )
        lines = [b"0:" + to_json(word) + b"\n" for word in words]
        self._stream([b'f:{"messageId":"msg-demo"}\n', *lines], self.delay)

    def _stream(self, lines: List[bytes], delay: float) -> None:
        end = b'{"finishReason":"stop","usage":{"promptTokens":null,"completionTokens":null}'
        self._send(
            200,
            *lines,
            b"e:" + end + b',"isContinued":false}\nd:' + end + b"}\n",
            delay=delay,
            headers={"Content-Type": "text/plain; charset=utf-8", "X-Vercel-AI-Data-Stream": "v1"},
        )

    def _send(
        self,
        status: int,
        *parts: bytes,
        headers: Optional[Dict[str, str]] = None,
        delay: float = 0.0,
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            **(headers or {}),
            "Keep-Alive": "timeout=5",
            "Transfer-Encoding": "chunked",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            time.sleep(delay)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("demo: " + format, *args)


class DemoServer(http.server.ThreadingHTTPServer):
    """The server of DemoAkash; logs broken connections instead of printing them."""

    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("demo: %s", sys.exc_info()[1])


def demo_image(seed: str) -> bytes:
    """Return a small PNG: rings in two colours derived from the seed."""
    import struct
    import zlib

    size = 96
    tint = binascii.crc32(seed.encode())
    colours = [
        bytes((tint >> shift & 255, 90 + shift * 5, 255 - (tint >> shift & 127)))
        for shift in (0, 16)
    ]

    def pixel(x: int, y: int) -> bytes:
        return colours[int(math.hypot(x - size / 2, y - size / 2)) // 8 % 2]

    rows = [b"\0" + b"".join(pixel(x, y) for x in range(size)) for y in range(size)]

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", binascii.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


# == 15. page =================================================================================
# A page to chat with, which asks the API as any client does. Knows nothing of the rest of this file.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>akashproxy</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --paper: light-dark(#fff, #17181b); --soft: light-dark(#f3f4f6, #24262b);
  --line: light-dark(#dcdfe4, #3a3d44); --ink: light-dark(#1c1d20, #e6e7e9); --faint: light-dark(#5f646d, #9ba1ab);
  --accent: light-dark(#0a62b8, #82bbff); --bad: light-dark(#b3261e, #ffa198); }
* { box-sizing: border-box; } [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
body { display: flex; flex-direction: column; height: 100dvh; margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
header, form, label, #note, main > * { width: min(45.5rem, 100% - 2.5rem); margin: 0 auto; }
header, form, label { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem 1rem; padding: .75rem 0; }
a { color: var(--accent); } .bad { color: var(--bad); }
header a { padding: .25rem 0; border-bottom: 2px solid transparent; color: var(--faint); text-decoration: none; }
header a[aria-current=true] { border-color: var(--accent); color: var(--ink); }
header a:last-child { margin-left: auto; }
button, select, input, textarea { min-width: 0; padding: .5rem .9rem; background: none; color: inherit; font: inherit; }
button, select, input, textarea, figure, section, .question { border: 1px solid var(--line); border-radius: .5rem; }
#model { flex: 0 1 11rem; text-overflow: ellipsis; }
#field { flex: 1 1 13rem; max-height: 40vh; field-sizing: content; resize: none; }
#send { border-color: var(--accent); background: var(--accent); color: var(--paper); }
main { flex: 1; overflow: auto; scrollbar-gutter: stable both-edges; padding: 1.5rem 0; overflow-wrap: anywhere;
  border-block: 1px solid var(--line); }
#log { display: flex; flex-direction: column-reverse; }     /* so that its end stays in sight while it grows */
#turns { margin-bottom: auto; }
#turns:empty::before { content: "Enter sends, Shift+Enter breaks the line, Escape stops."; color: var(--faint); }
.question, p, .thoughts { white-space: pre-wrap; }
.question { width: fit-content; max-width: 85%; margin-left: auto; padding: .6rem 1rem; background: var(--soft); }
.answer { margin: 1.25rem 0 2.5rem; } .answer[aria-busy=true] .text:empty::before { content: "\2026"; }
.text > *, .answer > *, section p { margin: 0 0 .75rem; } details > :not(summary) { margin: .75rem 0 0; }
:is(h1, h2, h3, h4, h5, h6) { font-size: 1.15rem; }
summary, .thoughts, figcaption { color: var(--faint); font-size: .875rem; }
details:has(> .thoughts:empty) { display: none; }
summary { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; cursor: pointer; }
.thoughts { padding-left: 1rem; border-left: 2px solid var(--line); }
ol { padding-left: 1.5rem; } li:not([value]) { list-style: disc; } .deep { margin-left: 1.5rem; }
img { display: block; max-width: 100%; }
pre, code { font: .875rem/1.5 ui-monospace, monospace; }
:not(pre) > code { padding: .1em .3em; border-radius: .25rem; background: var(--soft); }
pre { margin: 0; padding: 0 1rem .75rem; overflow-x: auto; scrollbar-width: thin; }
figcaption { display: grid; grid: auto / 1fr auto; align-items: center; min-height: 2.5rem; padding-left: 1rem; }
figcaption button { border: 0; background: none; }
section { margin-bottom: 1rem; padding: .75rem 1rem 0; }
</style>
<header><a href="#chat">Chat</a> <a href="#status">Controllers</a> <a href=".">New chat</a></header>
<label id="key" hidden>Token <input id="token" type="password" autocomplete="off"></label>
<div id="note" class="bad" role="alert"></div>
<main id="log" role="log" aria-label="Conversation" tabindex="0"><div id="turns"></div></main>
<main id="status" aria-label="Controllers" tabindex="0" hidden></main>
<form id="form">
  <select id="model" aria-label="Model"></select>
  <textarea id="field" rows="1" aria-label="Message" placeholder="Message"></textarea> <button id="send">Send</button>
</form>
<script type="module">
const {key, token, note, log, turns, status, form, model, field, send} =
  Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (element) => [element.id, element]));
const messages = [];    // the conversation so far
let stop = null;        // the AbortController of the answer that is coming

function make(tag, properties, ...children) {   // all that is shown is made here, as elements and text, never from HTML
  const element = Object.assign(document.createElement(tag), properties);
  for (const child of children.flat()) element.append(child);
  return element;
}

// -- the server, asked as any client asks it
async function api(path, options) {
  const secret = sessionStorage.token;
  const headers = {"Content-Type": "application/json", ...(secret && {Authorization: `Bearer ${secret}`})};
  const response = await fetch(path, {...options, headers}).catch(() => null);
  if (response?.ok) return response;
  if (!response) throw Error("The server does not answer. Is it still running?");
  if (response.status === 401) {
    key.hidden = false;
    token.focus();
    throw Error(secret ? "The token is wrong. Type the right one." : "This server needs a token. Type it above.");
  }
  const unread = {error: {message: `The server answered with ${response.status}.`}};
  throw failure((await response.json().catch(() => unread)).error, response.headers.get("Retry-After"));
}
function failure({message, code}, seconds) {    // what went wrong, and what to do
  const otherwise = code === "model_not_found" ? "Choose another model" : "Try again or choose another model";
  return Error(`${message} ${seconds ? `Try again in ${seconds} s` : otherwise}.`);
}
async function* events(stream) {    // what each event of a text/event-stream says, as JSON
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", part; !(part = await reader.read()).done;) {
    const whole = (held + part.value).split(/(?:\r\n|\n|\r(?!\n|$)){2}/);
    held = whole.pop();
    const data = (event) => event.match(/(?<![^\r\n])data:[^\r\n]*/g)?.map((line) => line.slice(5)).join("\n");
    yield* whole.map(data).filter((text) => text && text.trim() !== "[DONE]").map((text) => JSON.parse(text));
  }
}

// -- Markdown, as much of it as models use; the patterns take a time in proportion to the text, whatever it is.
const MORE = /(?:\n(?![ \t]*(?:$|```|~~~|#+ |[-*+] |\d+[.)] )).+)*/.source;     // a paragraph's further lines
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)]) (.*MORE)/.source.replace("MORE", MORE);
const BLOCK = RegExp([
  /^(?<indent>[ \t]*)(?<fence>```+|~~~+)(?<name>.*)(?:\n(?<code>[^]*?)(?:^[ \t]*\k<fence>[ \t]*$|(?![^])))?/.source,
  /^(?<level>#{1,6}) +(?<title>.+)/.source, `(?<list>(?:${ITEM}\\n*)+)`, `(?<text>^.*\\S.*${MORE})`].join("|"), "gm");
const INLINE = RegExp(`(${[/``.+?``(?!`)|`[^`\n]+`/, /\*\*(?=\S)[^*]+(?:\*[^*]+\*[^*]*){0,3}\*\*/,
  /(?<![\w*])\*(?=\S)[^*\n]+\*(?![\w*])/, /(?<!\w)_(?=\S)[^_\n]+_(?!\w)/,
  /!?\[[^[\]]*\]\(https?:\/\/(?:[^\s()]|\([^\s()]*\))+\)/, /https?:\/\/[^\s<>()*`"']*[^\s<>()*`"'.,;:!?]/,
].map(({source}) => source).join("|")})`);
function draw(place, text) {    // only blocks that changed are made anew
  [...text.matchAll(BLOCK)].forEach(({0: source, groups}, at) => {
    if (place.children[at]?.source === source) return;
    while (place.children[at]) place.lastChild.remove();
    place.append(Object.assign(block(groups), {source}));
  });
}
function block({fence, indent, name, code = "", level, title, list, text}) {
  if (fence) return listing(code.replace(RegExp(`^${indent}`, "gm"), "").replace(/\n$/, ""), name.trim());
  if (level) return make(`h${level.length}`, {}, inline(title));
  if (text) return make("p", {}, inline(text));
  return make("ol", {}, Array.from(list.matchAll(RegExp(ITEM, "gm")), ([, blanks, mark, words]) =>
    make("li", {className: blanks && "deep", ...(/\d/.test(mark) && {value: parseInt(mark)})}, inline(words))));
}
const inline = (text) => text.split(INLINE).map((part, at) => {     // every other part is one to be marked up
  if (at % 2 === 0) return part;
  if (part.startsWith("`")) return make("code", {}, part.replace(/^(``?)(.*)\1$/, "$2"));
  if (part.startsWith("**")) return make("strong", {}, inline(part.slice(2, -2)));
  if (/^[*_]/.test(part)) return make("em", {}, inline(part.slice(1, -1)));
  const [, image, label, href] = part.match(/^(!?)\[([^[\]]*)\]\((.*)\)$/s) ?? [, "", "", part];
  const [, own = ""] = image ? href.split(`//${location.host}${location.pathname}images/`) : "";
  if (/^\w[\w.-]*$/.test(own)) return picture(own, label);
  return make("a", {href, target: "_blank", rel: "noopener"}, label ? inline(label) : href);
});
function picture(name, alt) {   // fetched, for an <img> can't send a token; never read as SVG, which can hold a script
  const image = make("img", {alt});
  image.onerror = () => image.replaceWith(make("span", {className: "bad"}, "This picture can't be shown."));
  api(`images/${name}`).then((response) => response.blob()).then((blob) => {
    image.src = URL.createObjectURL(blob.slice(0, blob.size, "image/png"));
  }).catch(image.onerror);
  return image;
}
function listing(text, name) {
  const copy = make("button", {type: "button", hidden: !navigator.clipboard}, "Copy");  // plain HTTP has no clipboard
  copy.onclick = () => navigator.clipboard.writeText(text).then(() => { copy.textContent = "Copied"; });
  return make("figure", {}, make("figcaption", {}, name, copy), make("pre", {tabIndex: 0}, make("code", {}, text)));
}

// -- the chat
async function ask(question) {
  const chat = {model: model.value, messages: [...messages, {role: "user", content: question}]};
  const body = JSON.stringify({...chat, stream: true});
  const [thoughts, text] = ["thoughts", "text"].map((className) => make("div", {className}));
  const summary = make("summary"), thinking = make("details", {}, summary, thoughts);
  const article = make("article", {className: "answer", ariaBusy: "true"}, thinking, text);
  let answer = "", finish = "", frame = 0;
  function show() {
    frame = 0;
    summary.textContent = answer ? "Thoughts" : thoughts.textContent.trim().split("\n").pop();
    draw(text, answer);
  }
  turns.append(make("div", {className: "question"}, question), article);
  log.scrollTop = 0;      // the end
  try {
    const response = await api("v1/chat/completions", {method: "POST", body, signal: stop.signal});
    for await (const {error, choices: [{delta = {}, finish_reason} = {}] = []} of events(response.body)) {
      if (error) throw failure(error);
      answer += delta.content ?? "";
      if (delta.reasoning_content) thoughts.append(delta.reasoning_content);
      finish = finish_reason ?? finish;
      frame ||= requestAnimationFrame(show);
    }
    if (finish !== "stop") throw Error(`The answer ended early: ${finish || "the connection broke off"}.`);
  } catch (error) {
    article.append(make("p", {className: "bad"}, stop.signal.aborted ? "Stopped." : error.message));
  }
  show();
  article.append(make("details", {}, make("summary", {}, "As curl and Python"), examples(chat)));
  article.ariaBusy = "false";
  if (answer) messages.push(chat.messages.pop(), {role: "assistant", content: answer});
  else field.value ||= question;      // nothing has come: it can be sent again
}
function examples(chat) {   // what was asked, for a shell and for Python; the token stays out
  const base = new URL("v1", location).href, secret = sessionStorage.token ? ' -H "Authorization: Bearer $TOKEN"' : "";
  return [listing(`curl -N ${base}/chat/completions${secret} -H 'Content-Type: application/json' \\
  -d '${JSON.stringify({...chat, stream: true}).replaceAll("'", "'\\''")}'`, "curl"), listing(`import os, openai

client = openai.OpenAI(base_url="${base}", api_key=os.environ.get("TOKEN", "none"))
for chunk in client.chat.completions.create(stream=True, **${JSON.stringify(chat)}):
    print(chunk.choices[0].delta.content or "", end="")`, "Python")];
}

// -- what happens, and when
async function refresh() {      // the models, once, and the controllers while they are in sight
  if (document.hidden || !key.hidden) return;
  try {
    if (!model.length) {
      const {data} = await (await api("v1/models")).json();
      model.replaceChildren(...data.map(({id}) => make("option", {value: id}, id)));
      if (data.length) field.focus();
    }
    if (!status.hidden) {
      const {controllers} = await (await api("status")).json();
      status.replaceChildren(...controllers.map((each) => make("section", {}, make("b", {}, each.name),
        make("p", {}, `${each.in_flight} in flight, ${each.served} served, ${each.failed} failed, `,
          each.rests_for_seconds ? `rests for ${each.rests_for_seconds} s` : "ready"),
        each.last_error ? make("p", {className: "bad"}, `Last error: ${each.last_error}`) : "")));
    }
    note.textContent = "";
  } catch ({message}) {
    if (note.textContent !== message) note.textContent = message;     // a reader says it once
  }
}
form.onsubmit = async (event) => {
  event.preventDefault();
  const question = field.value.trim();
  if (stop) return stop.abort();
  if (!question || !model.value) return;
  [field.value, send.textContent, stop] = ["", "Stop", new AbortController()];
  await ask(question);
  [send.textContent, stop] = ["Send", null];
};
onkeydown = (event) => {
  if (event.key === "Escape") stop?.abort();
  if (event.target !== field || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!stop) form.requestSubmit();
};
token.onchange = () => {
  sessionStorage.token = token.value.replace(/[^!-~]/g, "");
  key.hidden = true;
  refresh();
};
onhashchange = () => {
  status.hidden = location.hash !== "#status";
  log.hidden = form.hidden = !status.hidden;
  document.querySelector("[href='#chat']").ariaCurrent = !log.hidden;
  document.querySelector("[href='#status']").ariaCurrent = !status.hidden;
  refresh();
};
onhashchange();
setInterval(refresh, 2000);
</script>
"""


@functools.lru_cache(maxsize=None)
def page() -> Tuple[bytes, Dict[str, str]]:
    """The page, and its header fields: nothing runs in it but its own script, and it loads nothing from elsewhere."""
    import hashlib

    texts = {
        tag: PAGE.partition("<" + tag)[2].partition(">")[2].partition("</" + tag)[0]
        for tag in ("style", "script")
    }
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in texts.items()
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return PAGE.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


# == 16. main =================================================================================
# The command line, the log and signals.


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; returns its exit status: 2 for invalid settings or arguments."""
    set_signal_mask("SIG_BLOCK")  # until Signals: without a handler SIGHUP ends the process
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        for problem in error.problems:
            print_text(f"akashproxy: {problem}", sys.stderr)
        return 2
    finally:
        discard_output()
        set_signal_mask("SIG_UNBLOCK")


def command(argv: List[str]) -> int:
    """Run the command; ConfigError if arguments or settings are invalid."""
    options = parse_flags(argv)
    flags = {name: value for name, value in vars(options).items() if isinstance(value, str)}
    settings = Settings.load(dict(os.environ), flags)
    if options.health or options.check:
        set_signal_mask("SIG_UNBLOCK")
        return check_health(settings) if options.health else print_settings(settings)
    handler = LogWriter(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    handler.setFormatter(LogFormat(settings.log_format))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    demo: Dict[str, Any] = {}
    if options.demo:
        demo = {"akash_base_url": DemoAkash.start(), "controllers": ()}
    if settings.config_file:  # a reload must read this file, not search for another
        flags["config_file"] = settings.config_file

    def load() -> Settings:
        return dataclasses.replace(Settings.load(dict(os.environ), flags), **demo)

    return start(Server(dataclasses.replace(settings, **demo)), load)


def print_text(text: str, file: Any = None) -> None:
    """Print a line; a full disk or a closed pipe is ignored."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def discard_output() -> None:
    """Flush stdout and stderr, and discard what can't be written.

    The interpreter would try once more at exit, fail, and exit with status 120.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class LogWriter(logging.Handler):
    """Writes log lines on a thread of its own. Any thread.

    A blocked pipe must not block the server. Lines are dropped if the queue is full or a write
    fails; their number is logged once the log can be written again.
    """

    SIZE = 10000  # lines in the queue
    FLUSH_TIMEOUT = 1.0  # seconds

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.lines: Queue[Any] = Queue(self.SIZE)  # bytes, or an Event of flush()
        self.dropped, self.count_lock = 0, threading.Lock()
        self.thread: Optional[threading.Thread] = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.thread is None:
            self.thread = threading.Thread(
                target=self.write_all, args=(self.lines,), name="akashproxy log", daemon=True
            )
            self.thread.start()
        try:
            self.lines.put_nowait((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Full:
            self.drop(1)
        except Exception:
            self.handleError(record)

    def drop(self, count: int) -> None:
        with self.count_lock:
            self.dropped += count

    def write_all(self, lines: Queue[Any]) -> None:
        while True:
            line = lines.get()
            if isinstance(line, threading.Event):
                line.set()
            elif not self.write(line):
                self.drop(1)
            elif self.dropped:
                self.report_dropped()

    def report_dropped(self) -> None:
        with self.count_lock:
            count, self.dropped = self.dropped, 0
        record = log.makeRecord(
            log.name, logging.WARNING, "", 0, "%d log lines were lost", (count,), None
        )
        if not self.write((self.format(record) + "\n").encode()):
            self.drop(count)

    def write(self, line: bytes) -> bool:
        """Write a complete line, blocking without a limit; False if an error prevents it."""
        while line:
            try:
                line = line[os.write(self.descriptor, line) :]
            except BlockingIOError:  # non-blocking by another process that shares it
                select.select([], [self.descriptor], [])
            except OSError:
                return False
        return True

    def flush(self) -> None:
        """Wait until the queued lines are written, up to FLUSH_TIMEOUT."""
        written = threading.Event()
        with contextlib.suppress(Full):
            if self.thread is not None:
                self.lines.put(written, timeout=self.FLUSH_TIMEOUT)
                written.wait(self.FLUSH_TIMEOUT)


def parse_flags(argv: List[str]) -> Any:
    """Parse the command line; ConfigError. Accepts Go's spelling: -config_file."""
    argv = [
        re.sub(r"^--?([a-z][a-z_-]+)", lambda flag: "--" + flag[1].replace("_", "-"), word)
        for word in argv
    ]
    parser = argument_parser()
    try:
        options, unknown = parser.parse_known_args(argv)
    except OSError:  # --help could not be written
        raise SystemExit(1) from None
    if unknown:
        import difflib

        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, re.findall("--[a-z-]+", parser.format_usage()), 1)
        parser.error(
            f"unknown {'flag' if name.startswith('-') else 'argument'} {name[:100]}"
            + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
        )
    return options


def argument_parser() -> Any:
    """Return the argument parser: a flag for each setting, and the actions."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError([message])  # the library would print the usage: a screen or more

    parser = Parser(
        prog="akashproxy.py",
        description="Serve Akash Chat and other upstreams as an OpenAI-compatible API.",
        allow_abbrev=False,
        epilog="Each setting is also an environment variable (--server-address: SERVER_ADDRESS) "
        "and a key of the configuration file (server_address). Flags override the environment, "
        "which overrides the file.",
    )
    parser.add_argument("--version", action="version", version=f"akashproxy {__version__}")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="use a built-in simulation of Akash Chat: no network needed",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate and print the effective settings, and exit",
    )
    parser.add_argument(
        "--health",
        action="store_true",
        help="query /health of a running server, and exit with 0 if it is healthy, else 1",
    )
    group = parser.add_argument_group("settings")
    for item in setting_fields(Settings):
        default = default_text(item)
        text = item.metadata["help"] + (f" (default: {default})" if default else "")
        metavar = {"str": "TEXT", "int": "NUMBER", "float": "SECONDS"}.get(item.type, "LIST")
        group.add_argument(
            flag_name(item), dest=item.name, metavar=metavar, help=text.replace("%", "%%")
        )
    return parser


def default_text(item: Any) -> str:
    """Format a setting's default for --help."""
    if item.default is dataclasses.MISSING:
        return ""
    return f"{item.default:g}" if item.type == "float" else format_value(item.default)


def print_settings(settings: Settings) -> int:
    """Print the effective settings with secrets redacted; the exit status."""
    searched = [settings.config_path] if settings.config_path else CONFIG_DIRECTORIES
    print_text(f"# searched: {', '.join(searched)} for {' and '.join(FILE_NAMES)}")
    print_text(f"# file: {settings.config_file or 'none'}")
    for name, value in settings.redacted_items():
        print_text(f"{name.upper()}={value}")
    for controller in settings.pool():
        source = f" ({controller.key_source})" if controller.key_source else ""
        print_section(controller.name, controller, {"api_key": source})
    for key in settings.keys:
        print_section(f"key {key.name}", key, {})
    return 0


def print_section(title: str, options: Any, suffixes: Dict[str, str]) -> None:
    """Print the non-empty settings of a controller or key."""
    lines = [
        f"{name}={value}{suffixes.get(name, '')}"
        for name, value in options.redacted_items()
        if value and name != "name"
    ]
    print_text("\n".join([f"\n[{title}]", *lines]))


def check_health(settings: Settings) -> int:
    """Query /health of the server with these settings, for containers without curl."""
    host, port = split_address(settings.server_address)
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=3)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        print_text(response.read().decode("utf-8", "replace"))
        return 0 if response.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print_text(f"akashproxy: no answer from {settings.server_address}: {error}", sys.stderr)
        return 1
    finally:
        connection.close()


def start(server: Server, load: Callable[[], Settings]) -> int:
    """Start a server, print its URL and serve until a signal; the exit status."""
    raise_fd_limit()
    gc.freeze()  # the module's objects live on: collections need not traverse them
    if not server.settings.needs_token() and not server.is_loopback:
        log.warning(
            "anyone who can reach %s can use this server and its upstreams' keys and quotas: "
            "set BEARER_TOKEN",
            server.url,
        )
    signals = Signals(signal.SIGINT, signal.SIGTERM, SIGHUP)
    line = f"akashproxy {__version__} serves {server.pool} on {server.url}/v1"
    server.start()
    print_text(line)
    return serve(server, load, signals)


def raise_fd_limit() -> None:
    """Raise the limit of file descriptors to the hard limit: each stream takes two."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


SIGHUP = getattr(signal, "SIGHUP", 0)  # 0: not available (Windows)


def set_signal_mask(action: str) -> None:
    """Block or unblock our signals: none may be lost or fatal during start-up."""
    if SIGHUP:
        signal.pthread_sigmask(getattr(signal, action), {signal.SIGINT, signal.SIGTERM, SIGHUP})


def flush_logs() -> None:
    for handler in logging.root.handlers:
        handler.flush()


class Signals:
    """Queue of received signals. Main thread.

    A second SIGINT or SIGTERM ends the process at once.
    """

    def __init__(self, *numbers: int) -> None:
        self.received: SimpleQueue[int] = SimpleQueue()
        self.stops = 0  # SIGINT and SIGTERM received
        for number in filter(None, numbers):
            signal.signal(number, self.on_signal)
        set_signal_mask("SIG_UNBLOCK")

    def on_signal(self, number: int, frame: Any) -> None:
        if number != SIGHUP:
            self.stops += 1
            if self.stops > 1:
                # On a thread: the handler may have interrupted a put() that holds the queue's lock.
                flushing = threading.Thread(target=flush_logs, daemon=True)
                flushing.start()
                flushing.join(1.0)
                os._exit(0)
        self.received.put(number)

    def next(self, seconds: float = 1.0) -> Optional[int]:
        """Return the next signal, or None after a timeout.

        The timeout bounds this race: a signal arrives; the main thread begins to wait before its
        handler has run, and is not interrupted.
        """
        with contextlib.suppress(Empty):
            return self.received.get(timeout=seconds)
        return None


def serve(server: Server, load: Callable[[], Settings], signals: Signals) -> int:
    """Serve until SIGINT or SIGTERM; SIGHUP reloads the settings. The exit status."""
    while True:
        number = signals.next()
        if number == SIGHUP:
            reload(server, load)
        elif number is not None:
            running = server.running_calls()
            if running:
                grace = server.settings.grace
                log.info("stopping: %d running requests have %g seconds to end", running, grace)
            server.stop()
            return 0


def reload(server: Server, load: Callable[[], Settings]) -> bool:
    """Reload the settings; False, and the old ones stay, if they are invalid."""
    try:
        server.reload(load())
        log.warning("the settings were reloaded")
        return True
    except Exception as error:
        log.error("the settings stay as they were: %s", error)
        return False


if __name__ == "__main__":
    sys.exit(main())
