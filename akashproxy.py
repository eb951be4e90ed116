#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Akash Chat and any OpenAI-compatible upstreams as one OpenAI-compatible server.

One module, the standard library only, Python 3.9 or newer:

    python3 akashproxy.py              # serves Akash Chat on http://127.0.0.1:16571/v1
    python3 akashproxy.py --demo       # the same without a network
    python3 akashproxy.py --help       # all settings

As a module it starts nothing by itself:

    import akashproxy

    settings = akashproxy.Settings(server_address="127.0.0.1:0")
    with akashproxy.Server(settings) as server:    # serves until the block ends
        print(server.url)

A kind of upstream is a subclass of Controller, registered in CONTROLLERS; it answers a Call with
events: Text, Reasoning, ToolCall, Image, and a Finish at the end. help() of each class says more,
help(akashproxy.Settings) lists the settings, and the README shows examples.

How it works
------------

A client speaks OpenAI's API or Anthropic's to this file; it speaks the web API of Akash Chat, or
OpenAI's, to upstreams. A *controller* knows one upstream; a *pool* chooses one for each request.

    client                               akashproxy.py                              upstream
    ------  Handler -> Dialect.parse -> Call -> Exchange -> Controller -> Transport  ------
    socket                                                                           socket
            StreamRelay <- Dialect.encode <- Text, Reasoning, Image, Finish <- decoder
            EventLoop: the thread that owns every client socket, and each relayed upstream

Left of the events nothing knows which upstream answered; right of them nothing knows what the
client speaks. Between the sockets everything is pushed: ``decoder.feed(data)`` returns events,
``dialect.encode(events)`` returns bytes, and nothing in there reads, waits or knows a socket.
Where both sides speak the same format, the events are RawBytes.

There are two kinds of threads. The *loop* reads requests, writes responses and relays streams; it
never blocks. *Workers* get one whole request each: they parse it, choose a controller and send the
request to the upstream, and may block in that. A streamed chat:

    1 loop    accept: Connection(IDLE). Head and body complete: RESPONDING, submit()
    2 worker  Handler.parse_request, do_POST: the body becomes a Call
    3 worker  CallResponder.attempt: Exchange chooses a controller, which sends the request
    4 worker  call_soon_threadsafe(StreamRelay.start); the worker is free
    5 loop    the upstream's bytes become events; the first one begins the response
    6 loop    back-pressure, pings, disconnects, deadlines
    7 loop    a failure before 5: submit(), back to 3; afterwards: an error frame
    8 loop    the end: access log, metrics, Connection(IDLE)

The sections, from top to bottom (``grep '^# ==' akashproxy.py``):
names, errors, events, settings, http, transport, streams, filters, tools, controllers, failures,
akash, openai, pool, dialects, loop, relay, limits, server, demo, page, main.

Where is ...

    a setting                          Settings, ControllerSettings
    the configuration file             ConfigFile, find_config
    an error and its form on the wire  APIError, Dialect.error_body
    what an upstream's error means     UPSTREAM_ERRORS, error_from_body, akash_error
    what hides secrets                 redact
    sessions and logins at Akash       AkashController, AkashLogin
    caches of sessions and models      Cache
    Akash's stream, line by line       AkashDecoder
    what is sent to Akash              akash_request
    images                             AkashImages
    <think> tags                       ThinkTagFilter
    stop sequences and max_tokens      StopFilter
    tools as text                      PromptedTools, ToolCallFilter
    OpenAI's stream                    ChatDecoder
    Anthropic's stream                 Messages
    OpenAI's newer stream              Responses
    their requests as a chat           Messages.to_chat, Responses.to_chat
    estimates of tokens                estimate_tokens, Dialect.count
    context lengths                    context_length
    relaying unparsed                  PassthroughDecoder, Passthrough
    failover                           Exchange
    cool-downs                         FAILURE_POLICY, CoolDown, Upstream.record_result
    waiting for a controller           CallQueue
    the choice by weight               weighted_round_robin
    aliases and fallbacks of models    Pool.resolve_alias, Exchange
    the choice by conversation         conversation_of, rendezvous
    the network's exceptions           upstream_error, UpstreamResponse.to_api_error
    strict HTTP                        find_head_end, parse_head, BodyDecoder
    connections to upstreams           ConnectionPool
    proxies on the way                 open_tunnel
    deadlines                          CancelScope, Connection.on_tick
    cancelling                         Cancellation
    request bodies                     BodyDecoder, check_body
    the gate                           check_head, check_page
    figures for Prometheus             METRICS, Metrics, prometheus_text
    a client's connection              Connection
    the log                            log_access, LogFormat, LogWriter
    a new endpoint                     ROUTES
    a new kind of upstream             CONTROLLERS
    tokens of clients                  authorize
    keys of several people             ClientKeySettings, KeyLimiter
    reloading                          Server.reload
    the stand-in of --demo             DemoAkash
    the page at /                      PAGE, page

To audit what becomes of your keys, read four sections: *settings* reads them, *transport* sends
them, to the controller's own base_url only, *failures* hides them (redact) in all that upstreams
say, and *server* compares the tokens of clients (authorize). Nothing is written to disk.

Licence (MIT)
-------------

Copyright (c) 2026 the akashproxy authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import signal
import sys

if sys.version_info < (3, 9):
    raise SystemExit(f"akashproxy needs Python 3.9 or newer, and this is {sys.version.split()[0]}")

if __name__ == "__main__" and hasattr(signal, "pthread_sigmask"):
    # Before anything else: a signal that comes while the file is loading would end the process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})

# == 1. names =================================================================================
# Imports, public names, JSON and small helpers. Importing the module starts nothing.

import base64
import binascii
import bisect
import collections
import contextlib
import copy
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
import traceback
import urllib.parse
import urllib.request
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from re import Pattern
from typing import (
    Any,
    Callable,
    ClassVar,
    Generic,
    NamedTuple,
    NoReturn,
    Optional,
    TypeVar,
    Union,
    get_args,
)

__version__ = "1.0.0"

# fmt: off
__all__ = [
    "main", "Settings", "ControllerSettings", "ConfigError", "Server", "Handler",
    "Controller", "CONTROLLERS", "Call", "APIError", "Category",
    "Transport", "EventStream", "BufferedBody", "AkashDecoder",
    "Event", "Text", "Refusal", "Citation", "Reasoning", "TextWasReasoning", "ToolCall", "Image",
    "ImageProgress", "Finish", "RawBytes", "fold",
]
# fmt: on

log = logging.getLogger("akashproxy")

# Limits of a JSON text. A value may take several hundred bytes of memory, however short it is.
MAX_JSON_VALUES = 100_000
MAX_RELAYED_VALUES = 1_000_000  # in a body that is relayed unparsed, such as arrays of token ids
MAX_JSON_DEPTH = 500  # levels of nesting, which every Python can parse and serialize recursively


def to_json(value: Any) -> bytes:
    """Serialize to compact JSON in UTF-8.

    Line breaks beyond ASCII are escaped: several clients split a stream with str.splitlines(), so
    that a raw U+2028, U+2029 or U+0085 would end an event's line. Lone surrogates become "?".
    """
    text = _encode(value)
    if not text.isascii():
        for mark in "\u2028\u2029\x85":
            if mark in text:
                text = text.replace(mark, rf"\u{ord(mark):04x}")
    return text.encode("utf-8", "replace")


def from_json(data: bytes, max_values: int = MAX_JSON_VALUES) -> Any:
    """Parse JSON in UTF-8.

    Raises ValueError for anything else: NaN and infinite numbers, invalid UTF-8, more than
    ``max_values`` values or more than MAX_JSON_DEPTH levels.
    """
    check_json(data, max_values)
    return _parse(data, _decode)


def json_or_none(data: bytes) -> Any:
    """Parse an upstream's JSON; None if it is invalid. Infinite numbers become None."""
    try:
        check_json(data, MAX_JSON_VALUES)
        return _parse(data, _decode_any)
    except ValueError:
        return None


def _parse(data: bytes, decode: Callable[[str], Any]) -> Any:
    data = data[3:] if data[:3] == b"\xef\xbb\xbf" else data
    try:
        if len(data) < LARGE_JSON or data.isascii():
            return decode(data.decode())
        return _parse_large(data, decode)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# One character beyond ASCII makes Python store its whole string with two or four bytes a character.
# Decoding, parsing and encoding a large document at once would take ten times its size, so its long
# strings are taken out, and read and written in slices.

LARGE_JSON = 1 << 20  # bytes; smaller documents are parsed at once, which is faster
LONG_STRING = 256  # bytes or characters; MAX_JSON_VALUES shorter strings are not large in total
STRING_SLICE = 1 << 16  # bytes or characters


def _parse_large(data: bytes, decode: Callable[[str], Any]) -> Any:
    """Parse with placeholders for the long strings, which are decoded in slices."""
    strings: dict[str, str] = {}
    skeleton, copied, nonce = bytearray(), 0, os.urandom(12).hex()
    for number, slices in enumerate(_long_strings(data)):
        decoded = bytearray()
        for begin, end in slices:
            decoded += _decode('"%s"' % data[begin:end].decode()).encode("utf-8", "surrogatepass")
        placeholder = f"{nonce}{number};"
        strings[placeholder] = decoded.decode("utf-8", "surrogatepass")
        skeleton += data[copied : slices[0][0]]
        skeleton += placeholder.encode()
        copied = slices[-1][1]
    skeleton += data[copied:]
    value = decode(skeleton.decode())
    for container, key, text in _strings_in(value):
        if text in strings:
            container[key] = strings[text]
    return value


def _long_strings(data: bytes) -> list[list[tuple[int, int]]]:
    """Slices of each long string of a JSON text, as (begin, end), except for keys."""
    if b"\\" in data:
        # Same length, but now every quote delimits a string and every backslash begins an escape.
        data = data.replace(b"\\\\", b"\\_").replace(b'\\"', b"\\_")
    spans = [
        match.span(1)
        for match in re.finditer(rb'"([^"]*)"(\s*:)?', data)
        if match.end() - match.start() > LONG_STRING and match[2] is None
    ]
    return [_slices(data, begin, end) for begin, end in spans]


def _slices(data: bytes, begin: int, end: int) -> list[tuple[int, int]]:
    """Slices of a string that split no character, escape or surrogate pair."""
    slices = []
    while end - begin > STRING_SLICE:
        cut = begin + STRING_SLICE
        # More than three continuation bytes in a row are invalid, wherever they are split.
        while data[cut] & 0xC0 == 0x80 and cut > begin + STRING_SLICE - 4:
            cut -= 1
        escape = data.rfind(b"\\", cut - 5, cut)
        cut = escape if escape >= 0 else cut
        cut = cut - 6 if _SURROGATE_PAIR.match(data, cut - 6) else cut
        slices.append((begin, cut))
        begin = cut
    return [*slices, (begin, end)]


_SURROGATE_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")


def _strings_in(value: Any) -> Iterator[tuple[Any, Any, str]]:
    """Iterate over the strings within a value, as (container, key, string)."""
    containers = [value]
    while containers:
        container = containers.pop()
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(container, dict):
            items = container.items()
        elif isinstance(container, list):
            items = enumerate(container)
        for key, item in items:
            if isinstance(item, str):
                yield container, key, item
            else:
                containers.append(item)


def request_json(value: Any, size: int) -> bytes | bytearray:
    """Serialize a request body, with little memory if the request was large.

    ``size`` is that of the request in bytes. The value is modified and restored meanwhile, so no
    other thread may use it.
    """
    targets = [
        target
        for target in _strings_in(value if size > LARGE_JSON else None)
        if len(target[2]) > STRING_SLICE or not target[2].isascii() and len(target[2]) > LONG_STRING
    ]
    if not targets:
        return to_json(value)
    nonce = os.urandom(12).hex()
    try:
        for number, (container, key, _) in enumerate(targets):
            container[key] = f"{nonce}{number};"
        skeleton = to_json(value)
    finally:
        for container, key, text in targets:
            container[key] = text
    output, copied = bytearray(), 0
    for placeholder in re.finditer(b"%b([0-9]+);" % nonce.encode(), skeleton):
        text = targets[int(placeholder[1])][2]
        output += skeleton[copied : placeholder.start()]
        for cut in range(0, len(text), STRING_SLICE):
            output += to_json(text[cut : cut + STRING_SLICE])[1:-1]
        copied = placeholder.end()
    output += skeleton[copied:]
    return output  # not as bytes: a copy would take as much memory again


def check_json(data: bytes, max_values: int) -> None:
    """Check the number of values and levels of a JSON text without parsing it.

    Raises ValueError. Each value follows an opening bracket or a comma, so those bound the number
    of values. Those within strings are counted too if even that stays below the limits; otherwise
    strings are removed first.
    """
    if len(data) <= 2 * MAX_JSON_DEPTH:
        return
    openings = data.count(b"[") + data.count(b"{")
    if openings <= MAX_JSON_DEPTH and openings + data.count(b",") < max_values:
        return
    if b"\\" in data:  # without escaped quotes, every quote left delimits a string
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = data.translate(None, _NO_MARKS)
    # A value has at most two strings: its key and itself.
    too_many = marks.count(b'"') > 4 * max_values
    marks = b"" if too_many else _outside_strings(marks.replace(b'""', b""))
    if too_many or len(marks) - marks.count(b"]") - marks.count(b"}") >= max_values:
        raise ValueError(f"more than {max_values} values")
    levels = itertools.accumulate(memoryview(marks.translate(_STEPS, b",")).cast("b"))
    if max(levels, default=0) > MAX_JSON_DEPTH:
        raise ValueError("nested too deeply")


def _outside_strings(marks: bytes) -> bytes:
    """Remove strings; in batches, as each part of a split takes a hundred bytes."""
    outside = bytearray()
    while marks:
        parts = marks.split(b'"', 100_000)
        marks = parts.pop() if len(parts) > 100_000 else b""
        outside += b"".join(parts[::2])
    return bytes(outside)


_NO_MARKS = bytes(set(range(256)) - set(b'"[]{},'))
_STEPS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff")  # as signed bytes: one level up or down


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """Parse a float; ValueError if it overflows, as Infinity is not JSON."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shorten(digits, 40)} is too large")
    return value


def _finite_or_none(digits: str) -> float | None:
    value = float(digits)
    return None if math.isinf(value) else value


def _integer(digits: str) -> int:
    """Parse an integer of bounded length: int() takes quadratic time."""
    if len(digits) > 4300:
        raise ValueError("an integer has more than 4300 digits")
    return int(digits)


# Pythons that have the function limit the digits themselves.
_parse_int: Any = int if hasattr(sys, "get_int_max_str_digits") else _integer
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_decode = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite, parse_int=_parse_int
).decode
# For Akash's lines: NaN, Infinity and overflowing numbers become None.
_decode_any = json.JSONDecoder(
    parse_constant=lambda name: None, parse_float=_finite_or_none, parse_int=_parse_int
).decode


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty dict; for untrusted JSON."""
    return value if isinstance(value, dict) else {}


def as_str(value: Any) -> str:
    """Return the value if it is a string, else ""."""
    return value if isinstance(value, str) else ""


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty list; for untrusted JSON."""
    return value if isinstance(value, list) else []


def count_or_none(value: Any) -> int | None:
    """The value if it is an integer from 0 to 2^53 - 1, which every client can read."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def shorten(text: str, limit: int = 200) -> str:
    """Truncate untrusted input for a log line or a message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def new_id() -> str:
    """24 random hexadecimal digits. Not for secrets."""
    return "%024x" % random.getrandbits(96)


def utc(timestamp: float) -> str:
    """Format a time.time() timestamp as in RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def start_thread(target: Callable[[], Any], name: str) -> bool:
    """Start a daemon thread; False if the system can't create one."""
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    except RuntimeError as error:
        log.error("cannot start thread %s: %s", name, error)
        return False
    return True


def similar_to(name: str, names: Sequence[str], count: int = 1) -> str:
    """Up to ``count`` similar names, as 'a' or 'b'; "" if there are none.

    Case is ignored. Names above 64 characters, and those after the first 500, are not looked at:
    clients and upstreams choose them.
    """
    import difflib  # only now, as it would slow down every start

    known = {each.lower(): each for each in names[:500] if len(each) <= 64}
    return " or ".join(
        repr(known[near]) for near in difflib.get_close_matches(name[:64].lower(), known, count)
    )


def _sha256(text: str | bytes) -> str:
    import hashlib

    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()


# == 2. errors ================================================================================
# Exceptions: a status and a message for the client, and a category for the pool. Knows no wire.


class Category(enum.Enum):
    """Kind of a failure, of which FAILURE_POLICY has the consequences.

    Its value is a metric label. In the order of how much an error says: of several, the client gets
    one of the last category.
    """

    RETRY = "again"  # a session or connection expired: same controller again
    LOCAL = "local"  # this machine lacks descriptors, memory or threads
    UNSUPPORTED = "ability"  # the controller doesn't support the request
    MODEL = "model"  # the upstream doesn't know the model
    AUTH = "auth"  # our key was rejected
    REFUSED = "refused"  # rejected for its model, content or size only
    REQUEST = "request"  # malformed: every upstream would reject it
    SERVER = "server"  # 5xx
    CUT = "cut"  # accepted, but not answered completely
    NETWORK = "network"  # no connection, or not HTTP
    RATE_LIMIT = "limit"


class ErrorDefaults(NamedTuple):
    """Defaults of an APIError, by its status."""

    category: Category = Category.SERVER
    type: str = "invalid_request_error"
    code: str | None = None


DEFAULTS_BY_STATUS = {
    **dict.fromkeys((400, 422), ErrorDefaults(Category.REQUEST)),
    401: ErrorDefaults(code="invalid_api_key"),
    403: ErrorDefaults(type="permission_error"),
    404: ErrorDefaults(Category.MODEL),
    413: ErrorDefaults(Category.REQUEST, code="request_too_large"),
    **dict.fromkeys((408, 409, 425), ErrorDefaults(Category.RATE_LIMIT)),
    429: ErrorDefaults(Category.RATE_LIMIT, "rate_limit_error", "rate_limit_exceeded"),
    **dict.fromkeys((502, 503, 504), ErrorDefaults(code="upstream_error")),
}


class Overflow(NamedTuple):
    """Tokens of a request that is too long for its model; 0: unknown."""

    prompt: int
    output: int  # requested at most
    limit: int


@dataclass(eq=False, repr=False)
class APIError(Exception):
    """An error response to the client.

    ``status`` is the HTTP status, ``retry_after`` seconds. ``retry=False`` makes official SDKs give
    up; they retry every 5xx otherwise. ``legacy_message`` replaces the message where users of
    akashchat-api-go expect a fixed one.

    ``category`` decides on failover and cool-down; by default it follows from the status.
    ``cooldown_scope`` is the part that cools down: the "controller", or only the request's "model".
    ``upstream_status`` is the upstream's own status, if it sent one. ``overflow``: the request does
    not fit into the model's context. ``reason`` is what /status shows of it: no client's or
    upstream's words. ``bug`` is the unexpected exception behind a 500: logged, never sent.
    """

    status: int
    message: str  # it goes to logs and /status, and may quote an upstream
    type: str = ""
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None
    retry: bool | None = None
    legacy_message: str = ""
    category: Category = field(default=None)  # type: ignore[assignment]
    cooldown_scope: str = "controller"
    upstream_status: int | None = None
    overflow: Overflow | None = None
    reason: str = ""
    bug: Exception | None = None

    def __post_init__(self) -> None:
        self.message = shorten(self.message, 1500)
        super().__init__(self.message)
        default = DEFAULTS_BY_STATUS.get(self.status, ErrorDefaults())
        self.type = self.type or ("server_error" if self.status >= 500 else default.type)
        self.code = self.code or default.code
        self.legacy_message = self.legacy_message or self.message
        self.category = Category(self.category or default.category)

    def headers(self) -> dict[str, str]:
        """Response headers of the error, the same in all dialects."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        # Without the header, Claude Code repeats even a 401 or 403 for minutes.
        if self.retry is not None or self.status in (401, 403):
            headers["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class ConfigError(Exception):
    """Invalid settings; ``problems`` is a list of messages."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ClientDisconnected(ConnectionError):
    """The client has closed its connection."""


class Queued(Exception):
    """The call is in the pool's queue; ``exchange.resume()`` will resume it."""


class ProtocolError(ValueError):
    """A message that violates HTTP/1.1; ``status`` is for the response to a client.

    It does not quote the message, as that of an upstream may contain secrets.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """400: invalid request; ``param`` is the key path of the invalid value."""
    return APIError(400, message, param=param, code=code)


LISTED = "/v1/models lists the available models."


def model_not_found(model: str) -> APIError:
    """404: the model does not exist, or the client's key may not use it."""
    message = f"The model {shorten(model)!r} does not exist." if model else "A model is required."
    return APIError(404, f"{message} {LISTED}", param="model", code="model_not_found")


def akash_model_not_found(model: str) -> APIError:
    """Akash Chat lacks the model: 500 "Error Model.", as in akashchat-api-go."""
    return APIError(
        500,
        f"The model {shorten(model)!r} does not exist or is not available at Akash Chat.",
        type="invalid_request_error",
        param="model",
        code="model_not_found",
        retry=False,
        legacy_message="Error Model.",
        category=Category.MODEL,
    )


def number_field(
    body: dict[str, Any], name: str, default: Any, integer: bool = False, minimum: float = 0
) -> Any:
    """Return a number of a request body; APIError 400 if it is not one, or too small."""
    value = body.get(name)
    if value is None:
        return default
    types = (int,) if integer else (int, float)
    if type(value) not in types or not abs(value) < 1e15:  # excludes bool, NaN and infinity
        raise bad_request(f"{name!r} must be {'an integer' if integer else 'a number'}.", name)
    if value < minimum:
        raise bad_request(f"{name!r} must be at least {minimum:g}.", name)
    return value


# == 3. events ================================================================================
# The internal vocabulary: a Call goes in, events come out. Knows neither HTTP nor wire formats.


@dataclass(frozen=True)
class Text:
    """A fragment of the answer."""

    text: str


@dataclass(frozen=True)
class Refusal(Text):
    """A fragment of the words in which the model refuses to answer."""


@dataclass(frozen=True)
class Citation:
    """A source of the text before it: an annotation of OpenAI's with a "url_citation"."""

    annotation: dict[str, Any]


@dataclass(frozen=True)
class Reasoning:
    """A fragment of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class TextWasReasoning:
    """All Text so far was reasoning. fold() corrects it; a stream has sent it already."""


@dataclass(frozen=True)
class ToolCall:
    """A fragment of a tool call; the first one of an index carries id and name.

    ``extra``: further fields, which upstreams want back, such as Gemini's extra_content.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True)
class Image:
    """A finished image: job, file name and URL at the upstream; bytes if requested.

    Without a file name the URL is for the client, and may be a data URL.
    """

    job: str
    prompt: str
    name: str
    url: str
    data: bytes | None = None


@dataclass(frozen=True)
class ImageProgress:
    """State of an unfinished image job; its queue position (0: in progress)."""

    status: str
    position: int = 0


@dataclass(frozen=True)
class Finish:
    """End of an answer: OpenAI's finish_reason; usage and stop sequence if known."""

    reason: str
    usage: dict[str, int] | None = None
    stop_sequence: str | None = None


def is_estimated(usage: dict[str, Any]) -> bool:
    """Whether token counts are estimated here, or by an upstream that says so."""
    return usage.get("estimated") is True


@dataclass(frozen=True)
class RawBytes:
    """Bytes in the client's own dialect, passed through unchanged."""

    data: bytes
    usage: dict[str, Any] | None = None  # of the answer, if the bytes contain it


Event = Union[
    Text, Citation, Reasoning, TextWasReasoning, ToolCall, Image, ImageProgress, Finish, RawBytes
]
EVENTS: tuple[type[Event], ...] = get_args(Event)
TextEvent = Union[Text, Reasoning]
BlockEvent = Union[Text, Reasoning, ToolCall]  # what an answer's content consists of


def text_of(event: Event) -> str:
    """The text of a fragment of the answer's content; "" for other events."""
    if isinstance(event, ToolCall):
        return event.arguments
    return event.text if isinstance(event, (Text, Reasoning)) else ""


def with_text(event: BlockEvent, text: str) -> BlockEvent:
    """A further fragment of the same block."""
    return ToolCall(event.index, text) if isinstance(event, ToolCall) else type(event)(text)


class CancelScope:
    """A blocking socket with a deadline, which other threads may shut down.

    Owner's thread: attach(), set_deadline(), detach(), raise_if_cancelled(). Any thread: cancel().
    After cancel() a blocked recv() returns, and raise_if_cancelled() raises the reason.
    The event loop calls cancel_overdue().
    """

    active: ClassVar[set[CancelScope]] = set()  # those with a socket

    sock: Any = None
    deadline = math.inf  # by time.monotonic()
    timeout_message = ""  # message of the error when the deadline passes
    timeout_category = Category.NETWORK  # of that error; CUT once the upstream is connected
    reason: Exception | None = None
    shutdown_how = socket.SHUT_RDWR

    @classmethod
    def cancel_overdue(cls, now: float) -> None:
        """Cancel all scopes whose deadline has passed, by time.monotonic(). Any thread."""
        for scope in cls.active.copy():
            if scope.deadline < now:
                message, category = scope.timeout_message, scope.timeout_category
                scope.cancel(APIError(504, message, code="timeout", category=category))

    def attach(self, sock: Any) -> None:
        # A race: cancel() sets the reason and then reads sock. Setting sock and then checking the
        # reason, at least one of the two threads sees what the other has written.
        self.sock = sock
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
        """Shut the socket down. The first reason is kept."""
        if self.reason is None:
            self.reason = reason
        self.deadline, sock = math.inf, self.sock
        if sock is not None:
            # SSLSocket.shutdown() would drop the TLS layer beneath the blocked recv(). OSError: the
            # owner has closed the socket meanwhile, so it does not block in it.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, self.shutdown_how)


CHAT_PATH = "/v1/chat/completions"
CONTEXT_FIELDS = ("context_length", "max_model_len")  # of a model; names that clients know
MAX_NAME = 256  # characters of a model's name, which is repeated in each event, in logs and lists


class Cancellation:
    """Cancels a request: ends its blocking read, sleep or wait in the queue.

    Any thread may call cancel(); all else belongs to the thread that processes the request.
    """

    reason: Exception | None = None
    is_shielded = False  # within shield()
    wakeup: Any = None  # an Event, or anything with its set()

    def __init__(self, client_has_left: Callable[[], bool] = lambda: False) -> None:
        self.client_has_left = client_has_left  # peeks at the connection
        self.scope = CancelScope()  # of the current attempt

    def cancel(self, reason: Exception | None = None) -> None:
        """Shut the upstream's socket down and end a sleep(). Any thread."""
        # A race: new_scope() and sleep() set scope and wakeup, then check the reason. Setting the
        # reason first, at least one of the two threads sees what the other has written.
        self.reason = reason or ClientDisconnected("the client disconnected")
        if reason or not self.is_shielded:
            self.scope.cancel(self.reason)
        if self.wakeup:
            self.wakeup.set()

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Postpone an interruption by the client's disconnection to the end of a block."""
        self.is_shielded = True
        try:
            yield
        finally:
            self.is_shielded = False
            if self.reason:
                self.scope.cancel(self.reason)
        self.raise_if_cancelled()

    def new_scope(self) -> None:
        """Start a scope for the next attempt; the last one may have been cancelled."""
        self.scope = CancelScope()
        if self.reason:
            self.scope.cancel(self.reason)

    def raise_if_cancelled(self) -> None:
        """Raise the reason if cancelled. Peeks at the client, as the loop may be behind."""
        if not self.reason and self.client_has_left():
            self.cancel()
        self.scope.raise_if_cancelled()

    def sleep(self, seconds: float) -> None:
        """Sleep for so many seconds, or until cancelled; raises the reason then."""
        self.wakeup = self.wakeup or threading.Event()
        if not self.reason:
            self.wakeup.wait(seconds)
        self.scope.raise_if_cancelled()


@dataclass(eq=False, repr=False)
class OriginalRequest:
    """A client's own request, for upstreams that speak its dialect."""

    headers: dict[str, str] = field(default_factory=dict)  # the few that are forwarded
    path = CHAT_PATH  # "": none, as the chat was rewritten
    query = ""  # with its "?"
    body: dict[str, Any] | None = None  # None: not a JSON object
    form_model: Any = None  # the FormField of raw_body that names the model
    raw_body = b""
    is_changed = False  # body differs from raw_body, or an upstream could read that differently
    content_type = "application/json"  # of raw_body


@dataclass(eq=False, repr=False)
class Attempt:
    """State of one attempt, of which the controller sets all but the first field."""

    retry_reason: str = ""  # "session" or "connection": a second try
    ignored_params: list[str] = field(default_factory=list)  # that the controller doesn't support
    overflow = ""  # the upstream will leave out the conversation's beginning: numbers
    content_type: str | None = None  # of a response passed through; None: it is translated
    status = 200  # of that response


def message_text(message: Any) -> str:
    """The text of a message in OpenAI's format; "" if it has none."""
    content = as_dict(message).get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(as_dict(part).get("text") or "") for part in parts)


@dataclass(eq=False, repr=False)
class Call:
    """A request in OpenAI's chat vocabulary.

    ``body`` is a chat-completions body, regardless of the client's dialect. ``attempt`` is the
    current one. Only the model changes, as aliases are resolved.
    """

    body: dict[str, Any]
    stream: bool = False
    relay_only: bool = False  # has no form as a chat
    image_count: int = 0  # 0: a chat
    images_as_bytes: bool = False  # else as URLs
    translation_error: APIError | None = None  # raised by controllers that can't relay it
    allowed_models: tuple[str, ...] = ()  # patterns of the client's key; (): all
    key_name = ""  # of the client's key
    one_image_at_a_time = False  # for a key with max_concurrency
    client = ""  # the key's name or, without one, the client's address
    preferred = ""  # name of a controller that has begun to answer the same request

    def __post_init__(self) -> None:
        self.model: str = self.body.get("model", "")
        self.requested_model = self.model  # before aliases are resolved
        if len(self.model) > MAX_NAME:
            raise model_not_found(self.model)
        self.untranslated: list[str] = []  # key paths that have no equivalent in ``body``
        self.original = OriginalRequest()
        self.prepared_requests: dict[str, Any] = {}  # translated, by the controller's name

    # Made on first use: a request brings its own cancellation, and each attempt is a new one.

    cancellation = functools.cached_property(lambda _: Cancellation())
    attempt = functools.cached_property(lambda _: Attempt())

    @property
    def text(self) -> str:
        """The text of the last message; "" if it has none."""
        return message_text(self.body["messages"][-1])

    @property
    def scope(self) -> CancelScope:
        """The deadline and cancellation of the current attempt, for a Transport."""
        return self.cancellation.scope

    def set_model(self, name: str) -> None:
        """Replace the model, also in the client's own request."""
        if name == self.model:
            return
        self.model, self.body = name, {**self.body, "model": name}
        original = self.original
        if original.body:
            original.body, original.is_changed = {**original.body, "model": name}, True

    def begin_attempt(self, retry_reason: str = "") -> None:
        self.attempt = Attempt(retry_reason)
        self.cancellation.new_scope()


@dataclass
class Answer:
    """A complete answer, for clients that do not stream."""

    text: str = ""
    reasoning: str = ""
    tools: list[ToolCall] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    finish: Finish = Finish("stop")
    refusal_text: str = ""
    citations: list[Citation] = field(default_factory=list)


def fold(events: Iterable[Event]) -> Answer:
    """Join the events of an answer; bytes that are passed through are left out."""
    answer = Answer()
    texts: dict[type[Event], list[str]] = {Text: [], Refusal: [], Reasoning: []}
    tools: dict[str, list[ToolCall]] = {}
    for event in events:
        if isinstance(event, (Text, Reasoning)):
            texts[type(event)].append(event.text)
        elif isinstance(event, TextWasReasoning):
            texts[Reasoning].append("".join(texts[Text]).rstrip("\n"))
            texts[Text].clear()
        elif isinstance(event, ToolCall):
            # A string as key: an upstream could choose integers with equal hashes.
            tools.setdefault("%x" % event.index, []).append(event)
        elif isinstance(event, Image):
            answer.images.append(event)
        elif isinstance(event, Citation):
            answer.citations.append(event)
        elif isinstance(event, Finish):
            answer.finish = event
    answer.text, answer.refusal_text, answer.reasoning = map("".join, texts.values())
    answer.tools = sorted(map(join_tool_call, tools.values()), key=lambda call: call.index)
    return answer


def join_tool_call(fragments: list[ToolCall]) -> ToolCall:
    arguments = "".join(fragment.arguments for fragment in fragments) or "{}"
    return dataclasses.replace(fragments[0], arguments=arguments)


# == 4. settings ==============================================================================
# Each setting is declared once; its environment variable, flag, --help and --check derive from the
# declaration. Knows nothing that runs.


def setting(
    default: Any,
    help: str,
    check: Callable[[Any], Any] = lambda value: value,
    secret: bool | Callable[[str], str] = False,
) -> Any:
    """Declare a setting as a dataclass field.

    ``check`` returns the value to use or raises ValueError. Secrets are redacted in repr() and
    --check, there by ``secret`` if it is a function.
    """
    metadata = {"help": help, "check": check, "secret": secret}
    if default == {}:
        return field(default_factory=dict, repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


# Checks: each returns the value to use, or raises ValueError.


def require(is_valid: Callable[[Any], Any], message: str) -> Callable[[Any], Any]:
    """Make a check that returns a valid value as it is."""

    def check(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(message)
        return value

    return check


positive = require(lambda value: value > 0, "must be greater than 0")
not_empty = require(bool, "must not be empty")  # an empty token admits clients that send none
controller_name = require(  # which is sent in a header
    re.compile("[A-Za-z0-9._-]{0,64}").fullmatch,
    "only letters, digits, '.', '_' and '-' are allowed, at most 64",
)
header_value = require(
    re.compile("(?! )[ -~]*(?<! )").fullmatch,
    "only printable ASCII without leading or trailing blanks is allowed",
)


def listen_address(text: str) -> str:
    """Check HOST:PORT, :PORT or [V6]:PORT."""
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """Split into host ("" for all interfaces) and port. localhost becomes 127.0.0.1."""
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r} has no port")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{port!r} is not a valid port")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address as [{host}]:{port}")
    check_host(host)
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def check_host(host: str) -> None:
    """Raise ValueError for a name that can't be encoded for DNS (IDNA)."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ValueError(f"{host!r} is not a valid host name") from None


def http_url(text: str) -> str:
    """Check a base URL and strip its trailing slash."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not an http:// or https:// URL")
    extra = parts.query or parts.fragment or parts.username is not None
    if extra or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("only scheme, host, port and path are allowed")
    check_host(parts.hostname)
    if parts.port == 0:  # .port itself raises ValueError above 65535
        raise ValueError("'0' is not a valid port")
    return text.rstrip("/")


def path_prefix(text: str) -> str:
    """Check /PATH and strip its trailing slash; empty for none. Raises ValueError."""
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", text):
        raise ValueError(f"{text!r} is not /PATH of letters, digits, '.', '_', '~', '-' and '/'")
    return text.rstrip("/")


def proxy_url(text: str) -> str:
    """Check SCHEME://[USER:PASSWORD@]HOST[:PORT] or "none"."""
    parts = urllib.parse.urlsplit(text)
    if text != "none" and (
        parts.scheme not in ("http", "socks5", "socks5h", "socks")
        or not parts.hostname
        or parts.path.strip("/")
        or not re.fullmatch("[!-~]+", text)
        or parts.port == 0
        or max(map(len, proxy_credentials(text))) > 255  # RFC 1929
    ):
        raise ValueError(
            "must be http://, socks5:// or socks5h://[USER:PASSWORD@]HOST:PORT, or none"
        )
    return text


def proxy_credentials(url: str) -> tuple[bytes, bytes]:
    """User and password in a proxy's URL, decoded; empty if there are none."""
    parts = urllib.parse.urlsplit(url)
    return (
        urllib.parse.unquote_to_bytes(parts.username or ""),
        urllib.parse.unquote_to_bytes(parts.password or ""),
    )


def without_password(url: str) -> str:
    """A proxy's URL with its password redacted."""
    return re.sub(r"^(\w+://[^:]*:).*@", r"\1********@", url)


def environment_proxies(environ: dict[str, str], problems: list[str]) -> dict[str, str]:
    """Values of HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, by lower-case name.

    As with curl, lower case takes precedence and a proxy without a scheme is an HTTP proxy.
    """
    names = ("https_proxy", "http_proxy", "all_proxy", "no_proxy")
    proxies = {name: environ.get(name) or environ.get(name.upper(), "") for name in names}
    for name, value in proxies.items():
        if value and name != "no_proxy":
            proxies[name] = value if "://" in value else f"http://{value}"
            try:
                proxy_url(proxies[name])
            except ValueError as error:
                problems.append(f"{name.upper()}: {error}; PROXY=none ignores it")
    return proxies


def environment_proxy(proxies: dict[str, str], url: str) -> str:
    """The proxy of the environment for a URL; "" for a direct connection."""
    parts = urllib.parse.urlsplit(url)
    proxy = proxies.get(f"{parts.scheme}_proxy") or proxies.get("all_proxy", "")
    patterns = proxies.get("no_proxy", "").replace(",", " ").lower().split()
    host, port = parts.hostname or "", url_origin(url)[2] if proxy else 0
    return "" if any(bypasses(pattern, host, port) for pattern in patterns) else proxy


def bypasses(pattern: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY (domain, address, network or *) covers a host."""
    try:
        network = ipaddress.ip_network(pattern.strip("[]"), strict=False)
        return ipaddress.ip_address(host) in network
    except ValueError:  # not both are addresses
        name, colon, number = pattern.rpartition(":")
        if colon and number.isdecimal():
            return int(number) == port and bypasses(name, host, port)
    domain = pattern.lstrip("*.")
    is_name = bool(domain) and not host.rpartition(".")[2].isdigit() and ":" not in host
    return pattern == "*" or is_name and f".{host}".endswith(f".{domain}")


def web_origin(text: str) -> str:
    """Check * or an origin, and return it as browsers send it. Raises ValueError."""
    match = re.fullmatch(r"(\*|null|[a-z][a-z0-9+.-]*://[^/\s]*)/?", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not an origin such as https://example.com")
    return match[1]


def additional_headers(headers: dict[str, str]) -> dict[str, str]:
    """Check request headers. Those that frame or route the request can't be set."""
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ValueError(f"{name!r} is not a valid header name")
        if name.lower() in ("content-length", "transfer-encoding", "connection", "host"):
            raise ValueError(f"{name!r} can't be set")
        header_value(value)
    return headers


def ca_bundle(path: str) -> str:
    """Check and read a file of CA certificates; a reload reads it again."""
    try:
        read_tls_context(path)
    except OSError as error:
        raise ValueError(f"{path!r} can't be used: {error.strerror or error}") from None
    return path


def one_of(*values: str) -> Callable[[str], str]:
    """Check for one of several words, in any case."""

    def check(text: str) -> str:
        if text.lower() not in values:
            raise ValueError(f"{text!r} is not one of {', '.join(values)}")
        return text.lower()

    return check


def alias_targets(aliases: dict[str, Any]) -> dict[str, Any]:
    """Check model aliases: each is for a model, or for a list to try in order."""
    for alias, target in aliases.items():
        models = target if isinstance(target, (list, tuple)) else [target]
        if not models or not all(isinstance(name, str) and name for name in models):
            raise ValueError(f"{alias!r} must be a model or a list of models")
    return aliases


class ValidatedSettings:
    """Base of dataclasses whose fields are checked on creation: ConfigError.

    Lists are accepted where a tuple is declared.
    """

    def __init_subclass__(cls) -> None:
        """Describe each setting in the docstring, for help()."""
        lines = [
            f"    {name}: {item.metadata['help']}"
            for name, item in vars(cls).items()
            if getattr(item, "metadata", None)
        ]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n", *lines])

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, item in setting_fields(type(self)).items():
            with collecting_errors(problems, name):
                value = getattr(self, name)
                if item.type.startswith("tuple") and isinstance(value, str):
                    value = from_text(item, value)
                if isinstance(value, list):
                    value = tuple(value)
                object.__setattr__(self, name, validate(item, value))
        if problems:
            raise ConfigError(problems)

    def redacted_items(self) -> list[tuple[str, str]]:
        """(name, value) of each setting, with secrets redacted."""
        items = []
        for name, item in setting_fields(type(self)).items():
            secret, text = item.metadata["secret"], format_value(getattr(self, name))
            if secret and text:
                text = secret(text) if callable(secret) else "********"
            items.append((name, text))
        return items


@dataclass(frozen=True)
class ControllerSettings(ValidatedSettings):
    """Settings of one controller: an object in the configuration's ``controllers``."""

    # fmt: off
    type: str = setting("openai", "openai, akash or echo")
    name: str = setting("",
        "its name in logs, /status and X-Akashproxy-Route; default: its type", controller_name)
    weight: float = setting(1.0, "share of requests, relative to the other weights; 0: off")
    priority: int = setting(1, "failover group: 2 is used only while none of group 1 is available")
    base_url: str = setting("",
        "the upstream's URL; default: https://api.openai.com/v1, or AKASH_BASE_URL", http_url)
    api_key: str = setting("",
        "the upstream's key; default: OPENAI_API_KEY for OpenAI's own host, AKASH_ACCESS_TOKEN for "
        "AKASH_BASE_URL's", header_value, secret=True)
    cookie: str = setting("",
        "cookie to send to the upstream: NAME=VALUE; default: AKASH_COOKIE for AKASH_BASE_URL's",
        header_value, secret=True)
    proxy: str = setting("",
        "proxy to the upstream; default: PROXY", proxy_url, secret=without_password)
    headers: dict[str, str] = setting({},
        "additional request headers", additional_headers, secret=True)
    models: tuple[str, ...] = setting((),
        "names or patterns of the models it serves; default: those its /v1/models lists")
    model_map: dict[str, str] = setting({}, "the upstream's model name by the client's")
    drop: tuple[str, ...] = setting((),
        "request parameters to remove, also within messages, for upstreams that reject them")
    rename: dict[str, str] = setting({}, "request parameters to send under another name")
    set: dict[str, Any] = setting({}, "request parameters of chats to set, after drop and rename")
    system_messages: str = setting("first",
        "where Messages and Responses put later system messages: first (merged) or user (text)",
        one_of("first", "user"))
    paths: tuple[str, ...] = setting((),
        "patterns of the paths to relay unchanged; default: all but /v1/messages and /v1/responses")
    max_concurrency: int = setting(0, "concurrent requests; 0: unlimited")
    tools: str = setting("",
        "tool calls: native (relayed), prompt (as text, for models without them) or refuse; "
        "default: native, for akash refuse", one_of("native", "prompt", "refuse"))
    context_overflow: str = setting("", "overrides CONTEXT_OVERFLOW", one_of("warn", "refuse"))
    speed: float = setting(50.0, "words per second of an echo controller; 0: unlimited")
    connect_timeout: float | None = setting(None, "overrides CONNECT_TIMEOUT", positive)
    first_byte_timeout: float | None = setting(None, "overrides FIRST_BYTE_TIMEOUT", positive)
    idle_timeout: float | None = setting(None, "overrides IDLE_TIMEOUT", positive)
    # fmt: on
    # Where --check says that a field's value comes from.
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class ClientKeySettings(ValidatedSettings):
    """Settings of one client key: an object in the configuration's ``keys``."""

    # fmt: off
    name: str = setting(dataclasses.MISSING,
        "the owner's name, in the log, /status and /metrics",
        lambda text: controller_name(not_empty(text)))
    key: str = setting(dataclasses.MISSING,
        "the token that the client sends", lambda text: header_value(not_empty(text)), secret=True)
    models: tuple[str, ...] = setting((), "names or patterns of the allowed models; default: all")
    requests_per_minute: int = setting(0, "model calls per minute; 0: unlimited")
    max_concurrency: int = setting(0, "concurrent model calls; 0: unlimited")
    refuse_fields: tuple[str, ...] = setting((), "body fields that requests must not contain")
    # fmt: on


@dataclass(frozen=True)
class Settings(ValidatedSettings):
    """Settings of a server. ``max_wait`` is also MAX_WAIT and --max-wait."""

    # fmt: off
    server_address: str = setting("localhost:16571",
        "address to listen on: HOST:PORT, :PORT or [V6]:PORT", listen_address)
    config_file: str = setting("",
        "file with settings and controllers; default: the first one found")
    config_path: str = setting("", "directory to search for that file, instead of the default ones")
    upstream: tuple[str, ...] = setting((),
        "URLs of OpenAI-compatible upstreams, comma-separated, instead of a file's controllers; "
        "openai: OPENAI_BASE_URL or OpenAI's own, with OPENAI_API_KEY",
        lambda text: text if text == "openai" else http_url(text))
    pool_type: str = setting("balanced",
        "how a controller is chosen: balanced, random, least_busy or affinity (by conversation)",
        one_of("balanced", "random", "least_busy", "affinity"))
    max_wait: float = setting(3.0,
        "seconds a request may wait while all controllers are cooling down or busy")
    model_aliases: dict[str, Any] = setting({},
        "model aliases, which may be patterns, and their targets: ALIAS=MODEL,ALIAS=MODEL; an "
        "alias that is repeated has several, to be tried in order", alias_targets)
    context_overflow: str = setting("warn",
        "if Akash Chat would leave out the beginning of a long conversation: warn (a header) or "
        "refuse (400)", one_of("warn", "refuse"))
    tools_prompt: str = setting("",
        "instruction for tools as text, in which {tools} and {call} stand for the functions and "
        "the form of a call; default: a built-in one",
        require(lambda text: "{tools}" in text and "{call}" in text,
                "must contain {tools} and {call}"))
    akash_base_url: str = setting("https://chat.akash.network",
        "URL of the Akash Chat server", http_url)
    bearer_token: tuple[str, ...] = setting((),
        "tokens that clients may use, comma-separated; default: no token is needed",
        lambda text: header_value(not_empty(text)), secret=True)
    akash_access_token: str = setting("",
        "access token of a protected Akash Chat server", header_value, secret=True)
    akash_cookie: str = setting("",
        "cookie to send to Akash Chat along with the session's: NAME=VALUE", header_value,
        secret=True)
    user_agent: str = setting(f"akashproxy/{__version__}",
        "User-Agent sent to upstreams", header_value)
    proxy: str = setting("",
        "proxy to all upstreams: http://, socks5:// or socks5h://[USER:PASSWORD@]HOST:PORT, or "
        "none; default: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY", proxy_url,
        secret=without_password)
    ca_file: str = setting("",
        "file with additional CA certificates for TLS to upstreams", ca_bundle)
    public_url: str = setting("",
        "URL of this server for clients; default: from their Host header", http_url)
    path_prefix: str = setting("", "path before all others, such as /secret", path_prefix)
    trusted_proxies: tuple[str, ...] = setting(("127.0.0.0/8", "::1/128"),
        "addresses or networks of reverse proxies whose X-Forwarded-For, -Host, -Prefix and -Proto "
        "are used in links and the log", lambda text: str(ipaddress.ip_network(text, strict=False)))
    page: str = setting("on", "chat page at /: on or off", one_of("on", "off"))
    metrics: str = setting("on",
        "Prometheus metrics at /metrics: on, public (without a token) or off",
        one_of("on", "public", "off"))
    cors_origins: tuple[str, ...] = setting((),
        "origins whose pages may use this server, comma-separated, * for all; default: all if a "
        "token is needed, else local ones", web_origin)
    connect_timeout: float = setting(10.0,
        "seconds to connect to an upstream, handshakes included", positive)
    session_timeout: float = setting(15.0,
        "seconds for an upstream to send a session, model list or image state", positive)
    first_byte_timeout: float = setting(300.0,
        "seconds until an answer's first text, reasoning or tool call", positive)
    idle_timeout: float = setting(120.0, "seconds without data within an answer", positive)
    image_timeout: float = setting(300.0, "seconds to generate an image", positive)
    image_poll: float = setting(0.5,
        "seconds until an image's state is first polled; later intervals are longer", positive)
    models_ttl: float = setting(600.0, "seconds a model list is cached")
    head_timeout: float = setting(10.0, "seconds to receive a request's head", positive)
    body_timeout: float = setting(60.0, "seconds to receive a request's body", positive)
    write_timeout: float = setting(60.0,
        "seconds for a client to read each part of a response", positive)
    keepalive_timeout: float = setting(75.0,
        "seconds after which an idle client connection is closed", positive)
    max_body: int = setting(32 << 20, "largest request body, in bytes")
    max_body_total: int = setting(256 << 20,
        "total of all request bodies being received, in bytes; 503 above it", positive)
    max_connections: int = setting(10000, "client connections at a time; further ones get a 503")
    heartbeat: float = setting(15.0,
        "seconds without data in a stream after which a ping is sent", positive)
    pings: str = setting("comment",
        "form of a ping: comment, chunk (an empty one) or off", one_of("comment", "chunk", "off"))
    workers: int = setting(1,
        'always 1; to use more cores, see "Several processes" in the README',
        require(lambda value: value == 1,
                "must be 1: to use more cores, run several processes behind one address; see "
                '"Several processes" in the README'))
    grace: float = setting(7.0, "seconds for running requests to finish after SIGTERM")
    log_format: str = setting("text", "text or json", one_of("text", "json"))
    log_level: str = setting("info",
        "debug, info, warning or error", one_of("debug", "info", "warning", "error"))
    # fmt: on
    environment_proxies: dict[str, str] = field(default_factory=dict, repr=False)
    # In a configuration file only.
    controllers: tuple[ControllerSettings, ...] = ()  # (): one Akash Chat server
    keys: tuple[ClientKeySettings, ...] = ()  # in addition to bearer_token

    @classmethod
    def load(cls, environ: dict[str, str], flags: dict[str, str] | None = None) -> Settings:
        """Load settings from flags ({field name: value}), the environment and a file.

        Flags override the environment, which overrides the file. Raises ConfigError with all
        problems found, each with its source.
        """
        problems: list[str] = []
        overrides: dict[str, Any] = {}
        for name, item in setting_fields(cls).items():
            flag = (flags or {}).get(name)
            names = (name.upper(), APISERVER_VARIABLES.get(name, ""))
            variable = next(filter(environ.get, names), "")
            source = variable if flag is None else flag_name(item)
            if source:
                text = environ[variable] if flag is None else flag
                with collecting_errors(problems, source):
                    overrides[name] = validate(item, from_text(item, text))
        if environ.get("CHATGPT_APISERVER_PORT") and "server_address" not in overrides:
            with collecting_errors(problems, "CHATGPT_APISERVER_PORT"):
                port = environ["CHATGPT_APISERVER_PORT"]
                overrides["server_address"] = listen_address(f":{port}")
        file, directory = overrides.get("config_file", ""), overrides.get("config_path", "")
        overrides["config_file"] = path = find_config(file, directory, problems)
        values = ConfigFile(path, environ, problems).settings() if path else {}
        values.update(overrides)
        upstreams = values.get("upstream")
        if upstreams:
            values["controllers"] = [upstream_options(url, environ, problems) for url in upstreams]
        for name, colon in ("PORT", ":"), ("DEFAULT_SERVER_ADDRESS", ""):
            if environ.get(name) and "server_address" not in values:
                with collecting_errors(problems, name):
                    values["server_address"] = listen_address(colon + environ[name])
        if not values.get("proxy"):
            values["environment_proxies"] = environment_proxies(environ, problems)
        if problems:
            raise ConfigError(problems)
        return cls(**values)

    def pool(self) -> list[ControllerSettings]:
        """Controllers with names and defaults filled in; Akash Chat if none is configured."""
        pool: list[ControllerSettings] = []
        upstreams = [upstream_options(url, {}, []) for url in self.upstream]
        for options in self.controllers or upstreams or [ControllerSettings(type="akash")]:
            name = base = options.name or options.type
            numbers = itertools.count(2)
            while any(name == other.name for other in pool):
                name = f"{base}-{next(numbers)}"
            pool.append(dataclasses.replace(options, name=name, **self._defaults(options)))
        return pool

    def _defaults(self, options: ControllerSettings) -> dict[str, Any]:
        """Values for the fields that a controller's settings leave empty."""
        urls = {"openai": OPENAI_URL, "akash": self.akash_base_url}
        base_url = options.base_url or urls.get(options.type, "")
        proxy, sources = options.proxy, dict(options.sources)
        if base_url and not proxy:
            proxy = self.proxy or environment_proxy(self.environment_proxies, base_url)
            sources["proxy"] = "PROXY" if self.proxy else "the environment"
        proxy = "" if proxy == "none" else proxy
        defaults: dict[str, Any] = {"base_url": base_url, "proxy": proxy, "sources": sources}
        # Akash's token and cookie are sent to its own server only.
        if options.type == "akash" and url_origin(base_url) == url_origin(self.akash_base_url):
            if self.akash_cookie and not options.cookie:
                defaults["cookie"], sources["cookie"] = self.akash_cookie, "AKASH_COOKIE"
            if self.akash_access_token and not options.api_key:
                defaults["api_key"] = self.akash_access_token
                sources["api_key"] = "AKASH_ACCESS_TOKEN"
        return defaults

    @functools.cached_property
    def needs_token(self) -> bool:
        """Whether clients must send a token."""
        return bool(self.bearer_token or self.keys)


OPENAI_URL = "https://api.openai.com/v1"
APISERVER_VARIABLES = {  # chatgpt-apiserver's names
    name: f"CHATGPT_APISERVER_{name.upper()}"
    for name in ("config_file", "config_path", "pool_type")
}


def is_openai_server(url: str) -> bool:
    """Whether OPENAI_API_KEY may be sent to a URL ("": the default)."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return not url or host == "api.openai.com" or host.endswith(".api.openai.com")


def upstream_options(url: str, environ: dict[str, str], problems: list[str]) -> ControllerSettings:
    """Settings of the controller for a value of UPSTREAM.

    OPENAI_API_KEY is sent to OpenAI's own hosts only and, for the word "openai", to that of
    OPENAI_BASE_URL, which OpenAI's SDKs use with this key, too. It may be missing for the latter.
    """
    openai = url == "openai"
    base_url = environ.get("OPENAI_BASE_URL", "") if openai else url
    values: dict[str, Any] = {}
    with collecting_errors(problems, "OPENAI_BASE_URL"):
        values["base_url"] = base_url and http_url(base_url)
    own = is_openai_server(values.get("base_url", "other"))
    key = environ.get("OPENAI_API_KEY", "") if openai or own else ""
    if own and environ and not key:
        problems.append(f"upstream: {url} needs OPENAI_API_KEY, which is not set")
    with collecting_errors(problems, "OPENAI_API_KEY"):
        values.update(api_key=header_value(key), sources={"api_key": "OPENAI_API_KEY"})
    return ControllerSettings(**values)


def url_origin(url: str) -> tuple[str, str | None, int]:
    """Scheme, host and port of an http(s) URL."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


CONFIG_DIRECTORIES = [".", ".config", "config", "/etc/akashproxy", "/etc/chatgpt-apiserver"]
FILE_NAMES = ["akashproxy.json", "chatgpt-apiserver.json"]
OTHER_FORMATS = ["yaml", "yml", "toml", "ini", "hcl", "properties"]  # read by chatgpt-apiserver
NOT_JSON = "only JSON is supported; please convert the file"


def find_config(file: str, directory: str, problems: list[str]) -> str:
    """Path of the configuration file: ``file``, else the first one found, else ""."""
    if file:
        return file
    directories = [directory] if directory else CONFIG_DIRECTORIES
    paths = [os.path.join(folder, name) for folder in directories for name in FILE_NAMES]
    others = [path[: -len("json")] + extension for path in paths for extension in OTHER_FORMATS]
    # Docker makes a directory where the file of a mount is missing: an error, not no file.
    found = next(filter(os.path.lexists, [*paths, *others]), "")
    if found in others:
        problems.append(f"configuration: {found}: {NOT_JSON}")
    elif directory and not found:
        problems.append(f"configuration: there is no {' or '.join(FILE_NAMES)} in {directory}")
    return found if found in paths else ""


class ConfigFile:
    """A configuration file of akashproxy or chatgpt-apiserver.

    All problems are added to ``problems``, with key paths such as "controllers[0].weight".
    """

    VARIABLE = r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}"
    SPECIAL_KEYS = ("port", "pool", "controllers", "keys")  # not fields of Settings as they are
    BASE_KEYS = ("config", "config_file")  # where chatgpt-apiserver has a controller's options

    def __init__(self, path: str, environ: dict[str, str], problems: list[str]) -> None:
        self.path, self.environ, self.problems = path, environ, problems

    def settings(self) -> dict[str, Any]:
        """Values of Settings."""
        data, known = self.read(self.path), setting_fields(Settings)
        special = {name: data.pop(name) for name in self.SPECIAL_KEYS if name in data}
        values = self.fields(known, data, "", self.SPECIAL_KEYS)
        port, pool = special.get("port"), special.get("pool")
        if port is None and self.is_chatgpt_apiserver(special.get("controllers")):
            port = 8080  # chatgpt-apiserver's default
        if port is not None and "server_address" not in values and not self.environ.get("PORT"):
            with collecting_errors(self.problems, f"{self.path}: port"):
                values["server_address"] = listen_address(f":{port}")
        if isinstance(pool, dict):  # chatgpt-apiserver's
            pool_type = self.fields({"type": known["pool_type"]}, pool, "pool.").get("type")
            values.update({"pool_type": pool_type} if pool_type else {})
        elif pool is not None:
            self.problem("pool", "must be an object")
        if "controllers" in special:
            values["controllers"] = self.controllers(special["controllers"])
        if "keys" in special:
            values["keys"] = self.keys(special["keys"])
        return values

    def is_chatgpt_apiserver(self, controllers: Any) -> bool:
        """Whether the file is chatgpt-apiserver's, by its name or by a controller's keys."""
        keys = {name for item in as_list(controllers) for name in as_dict(item)}
        return os.path.basename(self.path) == FILE_NAMES[1] or bool(keys & set(self.BASE_KEYS))

    def controllers(self, items: Any) -> tuple[ControllerSettings, ...]:
        if not isinstance(items, list) or not items:
            self.problem("controllers", "must be a list with at least one controller")
            return ()
        controllers = self.build_list(ControllerSettings, "controllers", items, self.controller)
        if controllers and not any(options.weight for options in controllers):
            self.problem("controllers", "all of them are off (weight 0)")
        return controllers

    def keys(self, items: Any) -> tuple[ClientKeySettings, ...]:
        if not isinstance(items, list):
            self.problem("keys", "must be a list")
            return ()
        keys = self.build_list(ClientKeySettings, "keys", items, self.key)
        if len({options.key for options in keys}) < len(keys):
            self.problem("keys", "two have the same key")
        return keys

    def build_list(
        self, cls: Any, key_path: str, items: list[Any], values_of: Callable[..., dict[str, Any]]
    ) -> tuple[Any, ...]:
        """Build ``cls`` from ``values_of(object, key path)``; names must be unique."""
        built = []
        for at, item in enumerate(items):
            before, item_path = len(self.problems), f"{key_path}[{at}]"
            if not isinstance(item, dict):
                self.problem(item_path, "must be an object")
                continue
            values = values_of(item, item_path)
            if len(self.problems) == before:
                built.append(cls(**values))
        names = [options.name for options in built if options.name]
        for name in {name for name in names if names.count(name) > 1}:
            self.problem(key_path, f"two have the name {name!r}")
        return tuple(built)

    def key(self, data: dict[str, Any], key_path: str) -> dict[str, Any]:
        """Values of ClientKeySettings."""
        for name in ("name", "key"):
            if name not in data:
                self.problem(f"{key_path}.{name}", "is missing")
        return self.fields(setting_fields(ClientKeySettings), data, key_path + ".")

    def controller(self, data: dict[str, Any], key_path: str) -> dict[str, Any]:
        """Values of ControllerSettings."""
        before, known = len(self.problems), setting_fields(ControllerSettings)
        base, base_path, file = self.base_config(data, key_path)
        values = {"type": "openai", **self.fields(known, base, base_path)}
        values.update(self.fields(known, data, key_path + ".", self.BASE_KEYS))
        if values["type"] not in CONTROLLERS:
            types = ", ".join(sorted(CONTROLLERS))
            self.problem(key_path + ".type", f"{values['type']!r} is not one of {types}")
        if values["type"] == "akash" and values.get("tools") == "native":
            self.problem(key_path + ".tools", "Akash Chat has no tools: use prompt or refuse")
        is_openai = values["type"] == "openai" and is_openai_server(values.get("base_url", ""))
        if values.get("api_key"):
            source = file if file and not data.get("api_key") else self.path
            values["sources"] = {"api_key": source}
        elif is_openai and len(self.problems) == before:  # an invalid base_url is left out
            key = self.environ.get("OPENAI_API_KEY", "")
            if not key:
                self.problem(key_path + ".api_key", "is missing, and OPENAI_API_KEY is not set")
            with collecting_errors(self.problems, "OPENAI_API_KEY"):
                values.update(api_key=header_value(key), sources={"api_key": "OPENAI_API_KEY"})
        return values

    def base_config(self, data: dict[str, Any], key_path: str) -> tuple[dict[str, Any], str, str]:
        """Pop ``config`` or ``config_file`` of a controller.

        Returns the object ({} after a problem), its key path, and its file ("": this one).
        """
        inline, file = data.pop("config", None) or {}, data.pop("config_file", None)
        if isinstance(file, str) and file:
            # Relative to this file or, as in chatgpt-apiserver, to the working directory.
            path = os.path.join(os.path.dirname(self.path), file)
            path = file if os.path.exists(file) and not os.path.exists(path) else path
            base = self.read(path, key_path + ".config_file")
            return base, f"{key_path}.config_file ({file}).", file
        if file not in (None, ""):
            self.problem(key_path + ".config_file", "must be the name of a file")
        if not isinstance(inline, dict):
            self.problem(key_path + ".config", "must be an object")
        return as_dict(inline), key_path + ".config.", ""

    def read(self, path: str, key_path: str = "") -> dict[str, Any]:
        """Read a JSON object and expand its ${NAME}s; {} after a problem."""
        try:
            with open(path, "rb") as file:
                data = from_json(file.read())
            if isinstance(data, dict):
                return as_dict(self.expand_env(data, key_path))
            message = "must be a JSON object"
        except OSError as error:
            message = str(error.strerror)
        except json.JSONDecodeError as error:
            message = f"line {error.lineno}, column {error.colno}: {error.msg}"
            if path.rpartition(".")[2].lower() in OTHER_FORMATS:
                message = NOT_JSON
        except (ValueError, RecursionError) as error:
            message = str(error)
        source = f"{self.path}: {key_path}" if key_path else "configuration"
        self.problems.append(f"{source}: {path}: {message}")
        return {}

    def expand_env(self, value: Any, key_path: str) -> Any:
        """Replace each ${NAME} in the strings of a JSON value by the environment variable."""
        if isinstance(value, dict):
            prefix = key_path and key_path + "."
            return {name: self.expand_env(item, prefix + name) for name, item in value.items()}
        if isinstance(value, list):
            return [self.expand_env(item, f"{key_path}[{at}]") for at, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in re.findall(self.VARIABLE, value):
            if not self.environ.get(name):
                self.problem(key_path, f"the environment variable {name} is not set")
        if "${" in re.sub(self.VARIABLE, "", value):
            self.problem(key_path, "${ must be followed by the name of an environment variable, }")
        return re.sub(self.VARIABLE, lambda match: self.environ.get(match[1]) or match[0], value)

    def fields(
        self, known: dict[str, Any], data: dict[str, Any], prefix: str, others: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Values of the known settings in an object. ``others`` are only suggested."""
        values = {}
        for name, value in data.items():
            if name in known:
                with collecting_errors(self.problems, f"{self.path}: {prefix}{name}"):
                    values[name] = validate(known[name], from_json_value(known[name], value))
            else:
                near = similar_to(name, [*known, *others])
                hint = f"; did you mean {near}?" if near else ""
                self.problem(prefix + name, "unknown key" + hint)
        return values

    def problem(self, key_path: str, message: str) -> None:
        self.problems.append(f"{self.path}: {key_path}: {message}")


@contextlib.contextmanager
def collecting_errors(problems: list[str], source: str) -> Iterator[None]:
    """Add a ValueError to the problems instead of raising it."""
    try:
        yield
    except ValueError as error:
        problems.append(f"{source}: {error}")


def setting_fields(cls: Any) -> dict[str, Any]:
    """Fields of a class that are declared by setting(), by name."""
    return {item.name: item for item in dataclasses.fields(cls) if item.metadata}


def flag_name(item: Any) -> str:
    """The command-line flag of a setting, such as --max-body."""
    return f"--{item.name.replace('_', '-')}"


def from_text(item: Any, text: str) -> Any:
    """Parse a setting's value in a flag or environment variable. Raises ValueError."""
    if item.type == "int":
        if not re.fullmatch("[0-9]+", text):
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if item.type == "float":
        if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]+)?", text):
            raise ValueError(f"{text!r} is not a number of seconds")
        return float(text)
    if item.type == "str":
        return text
    parts = [part.strip() for part in text.split(",")] if text else []
    if not item.type.startswith("dict"):
        return tuple(parts)
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in parts]
    if not all(name and value for name, value in pairs):
        raise ValueError(f"{text!r} is not NAME=VALUE,NAME=VALUE")
    values: dict[str, list[str]] = defaultdict(list)
    for name, value in pairs:
        values[name].append(value)
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def format_value(value: Any) -> str:
    """Format a setting's value; the inverse of from_text()."""
    if isinstance(value, dict):
        value = [
            f"{name}={each}"
            for name, item in value.items()
            for each in (item if isinstance(item, (list, tuple)) else [item])
        ]
    if isinstance(value, (list, tuple)):
        return ",".join(value)
    return "" if value is None else str(value)


def from_json_value(item: Any, value: Any) -> Any:
    """Convert a JSON value to a setting's type. Raises ValueError."""
    if item.type == "str":
        if isinstance(value, str):
            return value
        raise ValueError("must be a string")
    if item.type == "int":
        if type(value) is int and value >= 0:
            return value
        raise ValueError("must be a whole number, not negative")
    if "float" in item.type:  # or float | None
        if type(value) in (int, float) and 0 <= value < 1e15:
            return float(value)
        raise ValueError("must be a number, not negative")
    if item.type.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts)
        raise ValueError("must be a list of strings")
    if isinstance(value, dict) and (
        item.type == "dict[str, Any]" or all(isinstance(part, str) for part in value.values())
    ):
        return value
    raise ValueError("must be an object with strings as values")


def validate(item: Any, value: Any) -> Any:
    """Apply a setting's check, to each element of a tuple; a default needs none."""
    check = item.metadata["check"]
    if value == item.default:
        return value
    return tuple(map(check, value)) if isinstance(value, tuple) else check(value)


# == 5. http ==================================================================================
# A strict HTTP/1.1 codec for both sides (RFC 9112): heads and body framing. It rejects messages
# that two implementations could read differently (request smuggling). Knows no models and no JSON.

MAX_HEAD_BYTES = 65536
MAX_HEADERS = 100
MAX_INTERIM_RESPONSES = 100  # 1xx responses before the final one
RECV_SIZE = 65536
MAX_BUFFERED_BODY = 64 << 20  # bytes of a response that is parsed only when complete
MAX_SHORT_BODY = 4 << 20  # bytes of a list of models, of a session or of an error

_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
_BARE_BREAK = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])"
)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
_HOST = re.compile(r"[A-Za-z0-9.:_\[\]~%!$&'()*+;=-]*")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;[\t -~\x80-\xff]*)?")


def find_head_end(buffer: bytes | bytearray, scan_from: int = 0) -> int:
    """Index of the blank line that ends a head; -1 if the head is incomplete.

    ProtocolError as soon as the buffer cannot become a valid head. Everything before ``scan_from``
    has been scanned by an earlier call.
    """
    end = buffer.find(b"\r\n\r\n", scan_from)
    if (len(buffer) if end < 0 else end) > MAX_HEAD_BYTES:
        raise ProtocolError("the head is too large", 431)
    if end >= 0 or not buffer or buffer == b"\r":
        return end
    is_foreign = buffer.find(b"\r\n", scan_from) >= 0 and b"HTTP/" not in buffer
    is_text = 32 < buffer[0] < 127
    if is_foreign or not is_text or _BARE_BREAK.search(buffer, scan_from):
        raise ProtocolError("this is not HTTP/1.1")
    return end


# Heads repeat their lines from message to message, so parsed lines are cached. The lines of long
# heads are not, or the cache could hold megabytes.
cached = functools.lru_cache(maxsize=1024)
MAX_CACHED_HEAD = 2048
LONG_PATH = 8192  # longer paths match no route, so percent-decoding them would be wasted time


def parse_head(head: bytes, parse_line: Any) -> tuple[Any, dict[str, str]]:
    """Parse a head into its start line, by ``parse_line``, and its headers.

    Values of a repeated header are joined by ", ", those of set-cookie by a line feed.
    """
    line, *lines = head.decode("latin-1").split("\r\n")
    if len(lines) > MAX_HEADERS:
        raise ProtocolError("there are too many headers", 431)
    if len(head) <= MAX_CACHED_HEAD:
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
def parse_field(line: str) -> tuple[str, str]:
    """Parse a header line into its lower-case name and its value."""
    match = _FIELD.fullmatch(line)
    if not match:
        raise ProtocolError("a header is malformed")
    return match[1].lower(), match[2].strip(" \t")


@cached
def parse_request_line(line: str) -> tuple[str, str, str, str]:
    """Parse a request line into method, decoded path, query and minor version."""
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
        raise ProtocolError("the request target is malformed")
    path, _, query = target.partition("?")
    path = path if len(path) > LONG_PATH else urllib.parse.unquote(path, errors="replace")
    return method, path, query, "0" if http_minor == "0" else "1"


@cached
def parse_status_line(line: str) -> tuple[str, int]:
    """Parse a status line into its minor version and its status (RFC 9112, 4)."""
    match = _STATUS_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("this is not HTTP/1.1")
    return match[1], int(match[2])


class ChunkSizes(dict[bytes, int]):
    """Cache of chunk sizes by chunk-size line; -1 if that is malformed."""

    def __missing__(self, line: bytes) -> int:
        match = _CHUNK_SIZE.fullmatch(line)
        size = int(match[1], 16) if match else -1
        if len(self) < 4096 and len(line) < 16:
            self[line] = size
        return size


CHUNK_SIZES = ChunkSizes()


def split_plain_chunks(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """Split chunked data at its line breaks, all at once.

    Returns the payloads of complete chunks and the lines that follow; no payloads if a chunk
    contains a line break.
    """
    lines = data.rsplit(b"\r\n")  # in half the time of split()
    chunks = lines[1:-1:2]
    end = 2 * len(chunks)
    sizes = map(CHUNK_SIZES.__getitem__, lines[:end:2])
    # Only the last chunk is empty.
    if all(chunks[:-1]) and list(map(len, chunks)) == list(sizes):
        return chunks, lines[end:]
    return [], lines


def media_type(content_type: str) -> str:
    """Return a content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip(" \t").lower()


def is_json_type(kind: str) -> bool:
    """Return whether a media type is JSON or built on it (RFC 6839: "+json")."""
    return kind in ("application/json", "text/json") or kind.endswith("+json")


class BodyDecoder:
    """Removes the framing of a message body as its bytes arrive (RFC 9112, 6).

    feed() returns the payload within the data. ``done`` is set at the end of the body, and
    ``trailing_data`` then holds the bytes after it. close() reports the end of the connection.
    All of them raise ProtocolError for framing that is ambiguous, malformed or incomplete.
    """

    done = False
    trailing_data = b""
    chunked = until_close = False
    trailers = 0

    def __init__(self, fields: dict[str, str], until_close: bool = False) -> None:
        self.remaining = 0  # payload bytes still expected, of the body or of the current chunk
        self.buffer = b""  # an incomplete framing line
        self.state = "size"  # the framing line expected next: "size", "end" of a chunk, "trailer"
        coding, length = fields.get("transfer-encoding"), fields.get("content-length")
        if coding is not None:
            if length is not None:
                raise ProtocolError("both Content-Length and Transfer-Encoding")
            if coding.lower() != "chunked":
                raise ProtocolError("the Transfer-Encoding is not supported", 501)
            self.chunked = True
        elif length is not None:
            if not _LENGTH.fullmatch(length):
                raise ProtocolError("Content-Length is not a valid number")
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
        """Decode chunked coding (RFC 9112, 7.1).

        size [;extension] CR LF data CR LF ... 0 CR LF trailers CR LF
        """
        payload = self.complete_chunks(data)
        if payload:
            return payload
        data, self.buffer = self.buffer + data, b""
        parts, at, is_split = [], 0, False
        while not self.done:
            if self.remaining:
                part = data[at : at + self.remaining]
                parts.append(part)
                at += len(part)
                self.remaining -= len(part)
                if self.remaining:
                    break
                self.state = "end"
            elif self.state == "size" and not is_split:
                is_split = True
                chunks, lines = split_plain_chunks(data[at:])
                if chunks:
                    parts += chunks
                    at = len(data) - len(b"\r\n".join(lines))
                    self.done = not chunks[-1]
                    continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self.buffer = line = data[at:]
                is_longer = self.state == "end" and line not in (b"", b"\r")
                if is_longer or len(line) > 4096 or line.find(b"\n") >= 0:
                    raise ProtocolError("the chunked coding is malformed")
                break
            self._handle_framing_line(data[at:end])
            at = end + 2
        if self.done:
            self.trailing_data = data[at:]
        return b"".join(parts)

    def complete_chunks(self, data: bytes) -> bytes:
        """Return the payload of data that is complete plain chunks; else b"".

        The state does not change: neither a part of a chunk nor the last one follows.
        """
        if self.remaining or self.buffer or self.state != "size" or not data.endswith(b"\r\n"):
            return b""
        size, _, chunk = data.partition(b"\r\n")
        if len(chunk) - 2 == CHUNK_SIZES[size]:
            return chunk[:-2]
        if data.endswith(b"0\r\n\r\n"):  # a burst with its end, which need not be split twice
            return b""
        chunks, trailing = split_plain_chunks(data)
        return b"".join(chunks) if trailing == [b""] and chunks and chunks[-1] else b""

    def _handle_framing_line(self, line: bytes) -> None:
        if self.state == "size":
            size = CHUNK_SIZES[line]
            if size < 0:
                raise ProtocolError("a chunk's size is malformed")
            self.remaining, self.state = size, "size" if size else "trailer"
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


class ContentDecoder:
    """Removes gzip or deflate from a body as it arrives (RFC 9110, section 8.4.1).

    ValueError for another encoding; ProtocolError for a malformed body, or one that expands to more
    than MAX_RATIO times its size: it would fill the memory.
    """

    MAX_RATIO = 200  # a stream of short, similar events has up to 60
    MAX_OUTPUT = 1 << 20  # bytes expanded at a time

    def __init__(self, encoding: str) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise ValueError(encoding)
        self.inflater: Any = None  # of a member of a gzip file, which may have several
        self.received = self.expanded = 0

    def feed(self, data: bytes) -> bytes:
        """Return what the data expands to."""
        self.received += len(data)
        out = []
        while data:
            if self.inflater is None or self.inflater.eof:
                # Servers send deflate with zlib's header, as the standard says, or without.
                has_header = data[0] == 0x1F or data[0] & 15 == 8
                self.inflater = zlib.decompressobj(47 if has_header else -15)
            try:
                out.append(self.inflater.decompress(data, self.MAX_OUTPUT))
            except zlib.error as error:
                raise ProtocolError(f"malformed compression: {error}") from None
            self.expanded += len(out[-1])
            if self.expanded > self.MAX_OUTPUT + self.MAX_RATIO * self.received:
                raise ProtocolError("the compressed body expands to too much")
            data = self.inflater.unconsumed_tail or self.inflater.unused_data
        return b"".join(out)

    def close(self) -> None:
        """Raise ProtocolError if the compressed body is incomplete."""
        if self.inflater is not None and not self.inflater.eof:
            raise ProtocolError("the compressed body is incomplete")


# == 6. transport =============================================================================
# Connections to upstreams: urllib.request with a connection pool. All network exceptions end here;
# above this section an OSError can only mean that the client disconnected. Knows no models.


T = TypeVar("T")


class UpstreamRequest(urllib.request.Request):
    """A request to an upstream; ``fields`` are its headers but Content-Length."""

    method: str
    timeout: float  # of connecting, in seconds: the argument of OpenerDirector.open()

    def __init__(
        self,
        method: str,
        url: str,
        fields: dict[str, str],
        body: bytes | bytearray | None,
        scope: CancelScope,
        timeouts: Timeouts,
        retry_reason: str,
    ) -> None:
        """With a ``retry_reason`` it is repeated, and needs a new connection."""
        super().__init__(url, origin_req_host="", method=method)
        self.fields, self.body, self.scope = fields, body, scope
        self.timeouts, self.retry_reason = timeouts, retry_reason

    def parts(self) -> list[bytes | bytearray]:
        """Serialize head and body, together unless that would take much memory."""
        head = request_head(f"{self.method} {self.selector} HTTP/1.1", *self.fields.items())
        if self.body is None:
            return [head + b"\r\n"]
        head = b"%bContent-Length: %d\r\n\r\n" % (head, len(self.body))
        return [head, self.body] if len(self.body) > LARGE_JSON else [head + self.body]


@functools.lru_cache(maxsize=64)
def request_head(line: str, *fields: tuple[str, str]) -> bytes:
    """Serialize a head without Content-Length; ProtocolError for a line break in it."""
    lines = [line, *[f"{name}: {value}" for name, value in fields]]
    if re.search("[\r\n\0]", "".join(lines)):
        raise ProtocolError("a header contains a line break")
    return "\r\n".join([*lines, ""]).encode("latin-1")


class ConnectionPool(urllib.request.BaseHandler):
    """urllib handler for one address, with persistent connections. Any thread.

    It connects and sends; the caller receives. An idle connection that the server has closed is
    dropped before use. If the server closes one just as a request is sent, the response fails with
    Category.RETRY and the request is repeated on a new connection.
    """

    def __init__(self, base: str, proxy: str, ca_file: str) -> None:
        self.address, self.is_tls = address_of(base), base.lower().startswith("https:")
        self.proxy, self.ca_file = proxy, ca_file
        self.forwarded = proxy.startswith("http:") and not self.is_tls  # by the proxy, as requests
        self.idle: list[tuple[float, Any]] = []  # (expires_at, socket), the last used one last
        self.closed = False
        self.lock = threading.Lock()

    def http_open(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send a request on an idle or a new connection, and leave its socket blocking."""
        sock = None if request.retry_reason else self._acquire()
        reused, scope, timeouts = sock is not None, request.scope, request.timeouts
        scope.set_deadline(timeouts.first, timeouts.connect_message)
        deadline = scope.deadline
        try:
            if sock is None:
                sock = self._connect(request)
            scope.attach(sock)
            scope.deadline, scope.timeout_message = deadline, timeouts.first_byte_message
            scope.timeout_category = Category.CUT
            try:
                if sock.gettimeout() is not None:
                    sock.setblocking(True)
                for part in request.parts():
                    sock.sendall(part)
            except OSError as error:
                # The server may have sent an error and closed without reading all of the request:
                # that response must still be read.
                if not reused and not isinstance(error, ConnectionError):
                    raise
                log.debug("%s closed the connection while a request was sent", self.address[0])
            return UpstreamResponse(sock, request, reused, self)
        except BaseException:
            sock = scope.sock
            scope.detach()
            if sock is not None:
                sock.close()
            raise

    https_open = http_open

    def release(self, sock: Any, seconds: float) -> None:
        """Keep a connection for reuse within ``seconds``."""
        with self.lock:
            if not self.closed:
                self.idle.append((time.monotonic() + seconds, sock))
                return
        sock.close()

    def close_expired(self, now: float) -> None:
        """Close idle connections whose time is over at ``now`` (time.monotonic())."""
        with self.lock:
            expired = [sock for expires_at, sock in self.idle if expires_at < now]
            self.idle[:] = [entry for entry in self.idle if entry[0] >= now]
        for sock in expired:
            sock.close()

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.close_expired(math.inf)

    def _acquire(self) -> Any:
        """Pop an idle connection that the server has not closed; None if there is none."""
        while True:
            with self.lock:
                if not self.idle:
                    return None
                expires_at, sock = self.idle.pop()
            if expires_at >= time.monotonic() and peek(sock) is None:
                return sock
            sock.close()

    def _connect(self, request: UpstreamRequest) -> Any:
        address = address_of(self.proxy) if self.proxy else self.address
        sock: Any = connect_within(request.scope, address, request.timeout)
        if self.proxy and not self.forwarded:
            open_tunnel(sock, self.proxy, *self.address)
        if self.is_tls:
            context = TLS_CONTEXTS.get(self.ca_file) or read_tls_context(self.ca_file)
            sock = context.wrap_socket(
                sock,
                server_hostname=self.address[0],
                suppress_ragged_eofs=False,  # or a connection that was cut would look complete
                do_handshake_on_connect=False,  # or it could not be cancelled
            )
            request.scope.attach(sock)
            sock.do_handshake()
        return sock


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of an upstream or a proxy."""
    parts = urllib.parse.urlsplit(url)
    return str(parts.hostname), parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)


def connect_within(scope: CancelScope, address: tuple[str, int], seconds: float) -> socket.socket:
    """Connect to an address, and limit the handshakes that follow to the time left.

    The caller closes the socket that the scope holds, if this or a handshake fails.
    """
    *others, last = socket.getaddrinfo(*address, 0, socket.SOCK_STREAM)
    for info in (*others, last):
        deadline = time.monotonic() + seconds
        try:
            sock = socket.socket(*info[:3])
            scope.attach(sock)
            sock.settimeout(seconds)
            sock.connect(info[4])
            break
        except OSError:
            if info is last:
                raise
            if scope.sock:
                scope.sock.close()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)
    scope.deadline = min(scope.deadline, deadline)
    return sock


def open_tunnel(sock: socket.socket, url: str, host: str, port: int) -> None:
    """Have a proxy connect a socket to an address; ConnectError if it does not."""
    proxy = urllib.parse.urlsplit(url)
    ask = ask_http_proxy if proxy.scheme == "http" else ask_socks_proxy
    with sock.makefile("rb") as replies:  # reads no byte of the upstream: clients begin
        problem = ask(sock, replies, url, host, port)
    if problem:
        raise ConnectError(f"the proxy {proxy.hostname} {problem} (check PROXY)")


def ask_http_proxy(sock: socket.socket, replies: Any, url: str, host: str, port: int) -> str:
    """Send CONNECT (RFC 9110, 9.3.6); return what the proxy does not do, or ""."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    fields = {"Host": target, **proxy_authorization(url)}
    sock.sendall(request_head(f"CONNECT {target} HTTP/1.1", *fields.items()) + b"\r\n")
    reply = re.match(rb"HTTP/1\.[01] ([0-9]{3})\b", replies.readline(MAX_HEAD_BYTES))
    if reply and reply[1] != b"200":
        return f"refused the connection with status {int(reply[1])}"
    lines = (replies.readline(MAX_HEAD_BYTES).strip() for _ in range(MAX_HEADERS))
    is_complete = reply is not None and not all(lines)
    return "" if is_complete else "does not answer as an HTTP proxy does"


def proxy_authorization(url: str) -> dict[str, str]:
    """Return the header with the credentials in a proxy's URL, if there are any."""
    if urllib.parse.urlsplit(url).username is None:
        return {}
    credentials = base64.b64encode(b":".join(proxy_credentials(url))).decode()
    return {"Proxy-Authorization": "Basic " + credentials}


def ask_socks_proxy(sock: socket.socket, replies: Any, url: str, host: str, port: int) -> str:
    """Log in and connect by SOCKS 5 (RFC 1928, 1929); return what failed, or "".

    socks5:// looks up names here, socks5h:// lets the proxy do it. socks:// is what GNOME writes
    into the environment for socks5://.
    """
    credentials = proxy_credentials(url)
    sock.sendall(b"\5\2\0\2" if credentials[0] else b"\5\1\0")
    method = replies.read(2)
    if method == b"\5\2" and credentials[0]:
        sock.sendall(b"\1" + b"".join(bytes([len(text)]) + text for text in credentials))
        if replies.read(2)[1:] != b"\0":
            return "rejected the user or the password"
    elif method != b"\5\0":
        return "is not SOCKS 5 or refuses this login"
    address = socks_address(host, url.startswith("socks5h:"))
    sock.sendall(b"\5\1\0" + address + port.to_bytes(2, "big"))
    _, code, _, address_type = replies.read(4).ljust(4, b"\xff")
    length = {1: 4, 4: 16}.get(address_type) or int.from_bytes(replies.read(1), "big")
    replies.read(length + 2)  # the address that the proxy uses
    return f"can't reach it (SOCKS reply {code})" if code else ""


def socks_address(host: str, remote_names: bool) -> bytes:
    """A host in RFC 1928's form: a type, then 4 bytes, 16 bytes or a counted name."""
    try:
        if not remote_names:
            host = str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
        packed = ipaddress.ip_address(host).packed
    except socket.gaierror as error:
        raise ConnectError(connect_problem(error, host, "")) from error
    except ValueError:
        name = host.encode("idna")
        return bytes([3, len(name)]) + name
    return (b"\1" if len(packed) == 4 else b"\4") + packed


class ConnectError(OSError):
    """A connection could not be opened; the message is for clients and operators."""


def connect_problem(error: Exception, upstream: str, proxy: str) -> str:
    """Reason why an upstream, or the proxy before it, can't be used; "" if unknown."""
    # No ports: clients need not know the inner network.
    proxy = address_of(proxy)[0] if proxy else ""
    where = f"the proxy {proxy}" if proxy else upstream
    if isinstance(error, ConnectError):
        return str(error)
    if isinstance(error, socket.gaierror):
        setting = "PROXY" if proxy else "the address"
        return f"the name {proxy or upstream!r} can't be looked up (check {setting} and the DNS)"
    if isinstance(error, ConnectionRefusedError):
        return f"{where} refused the connection (check that it runs, and the port)"
    verify_message = getattr(error, "verify_message", "")
    if verify_message:
        return f"the certificate of {upstream} can't be verified: {verify_message} (set CA_FILE)"
    if getattr(error, "reason", "") in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
        return f"{upstream} does not speak TLS (check the port, and whether it is https)"
    return ""


def is_persistent(http_minor: str, headers: dict[str, str]) -> bool:
    """Return whether a connection outlasts a message of HTTP/1.x (RFC 9112, 9.3)."""
    if "connection" not in headers:
        return http_minor == "1"
    options = [option.strip().lower() for option in headers.get("connection", "").split(",")]
    return "close" not in options if http_minor == "1" else "keep-alive" in options


def keepalive_seconds(headers: dict[str, str]) -> float:
    """Seconds for which an idle connection may be reused."""
    keep_alive = headers.get("keep-alive")
    match = re.search(r"timeout=([0-9]{1,4})", keep_alive) if keep_alive else None
    # One second less than the server's, or a request could cross its close.
    return max(0.0, float(match[1]) - 1) if match else 30.0


# Makes one recv() of a blocking socket not block.
DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
PEEK = socket.MSG_PEEK | DONTWAIT

try:
    from ssl import SSLEOFError as RaggedEnd, SSLWantReadError as WantRead
except ImportError:  # a Python without ssl
    RaggedEnd = WantRead = BlockingIOError  # type: ignore[misc,assignment]


def peek(sock: Any) -> bytes | None:
    """Peek at the next byte: b"" if the peer has closed, None if nothing has arrived."""
    try:
        if not DONTWAIT and not select.select([sock], [], [], 0)[0]:  # Windows
            return None
        return socket.socket.recv(sock, 1, PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def peer_has_closed(sock: socket.socket) -> bool:
    """Return whether the peer has closed; on Linux even if unread data precedes it."""
    peeked = peek(sock)
    if peeked and hasattr(socket, "TCP_INFO"):
        # Linux: the first byte of struct tcp_info is the state, 1 is TCP_ESTABLISHED.
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"
    return peeked == b""


TLS_CONTEXTS: dict[str, Any] = {}  # by CA_FILE, as it was last read


def read_tls_context(ca_file: str) -> Any:
    """Create and keep a TLS context: the system's CAs and those of a file."""
    import ssl  # here: a Python without it can still reach http upstreams

    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    # A connection that ends without close_notify was cut. With this option, 0x80, which older
    # Pythons have no name for, OpenSSL 3 would report it as complete.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    TLS_CONTEXTS[ca_file] = context
    return context


class UpstreamResponse:
    """Response of an upstream: parses the head, then removes the body's framing.

    ``status`` is 0 until the head is complete. ``reused`` is set if the connection served another
    request before. One thread at a time.
    """

    has_begun = False  # a byte has arrived
    status = 0
    keep_alive = False
    headers: dict[str, str] = {}
    body = NO_BODY
    content: ContentDecoder | None = None  # of a compressed body
    opening = b""  # the payload received first, or together with the head
    interim = 0  # number of 1xx responses so far

    def __init__(
        self, sock: Any, request: UpstreamRequest, reused: bool, pool: ConnectionPool
    ) -> None:
        self.sock, self.request, self.scope = sock, request, request.scope
        self.reused, self.pool, self.timeouts = reused, pool, request.timeouts
        self.first_byte_deadline = self.scope.deadline  # until the first content
        self.head_buffer = bytearray()  # an incomplete head

    def receive(self, data: bytes) -> bytes:
        """Return the payload within bytes of the socket, b"" at its end. NETWORK_ERRORS."""
        if data:
            if not self.status:
                data = self._head(data)
            payload = self.body.feed(data) if data else b""
        else:
            self.scope.raise_if_cancelled()
            if not self.status:
                raise ConnectionError("the connection was closed without a response")
            self.body.close()
            payload = b""
        return self._expand(payload) if self.content else payload

    def _expand(self, payload: bytes) -> bytes:
        """Decompress the payload; ProtocolError if the body ends within it."""
        assert self.content
        data = self.content.feed(payload)
        if self.body.done:
            self.content.close()
        return data

    def _head(self, data: bytes) -> bytes:
        """Parse the head once it is complete; return the bytes after it."""
        buffer = self.head_buffer
        self.has_begun, scan_from = True, max(0, len(buffer) - 3)
        buffer += data
        while not self.status:
            end = find_head_end(buffer, scan_from)
            if end < 0:
                return b""
            (http_minor, status), self.headers = parse_head(bytes(buffer[:end]), parse_status_line)
            del buffer[: end + 4]
            scan_from = 0
            if status >= 200:
                self.status = status
            elif self.interim == MAX_INTERIM_RESPONSES:
                raise ProtocolError("there are too many interim responses")
            self.interim += 1
        self.head_buffer = bytearray()
        no_body = self.request.method == "HEAD" or status in (204, 304)
        self.body = BodyDecoder({} if no_body else self.headers, until_close=not no_body)
        self.keep_alive = is_persistent(http_minor, self.headers) and not self.body.until_close
        if "content-encoding" in self.headers:
            self._check_content_encoding(self.headers["content-encoding"].strip().lower())
        return bytes(buffer)

    def _check_content_encoding(self, encoding: str) -> None:
        """Prepare for a compressed body, which some upstreams send although they must not."""
        if encoding in ("", "identity") or self.body.done:
            return
        try:
            self.content = ContentDecoder(encoding)
        except ValueError:
            # A hostile upstream could quote this server's key.
            name = f" {encoding!r}" if re.fullmatch("[a-z, ]{1,16}", encoding) else ""
            problem = (
                f"sent the Content-Encoding{name}, which was not asked for and is not supported"
            )
            raise truncated(self.timeouts.upstream_name, problem) from None

    def read_head(self) -> None:
        """Block until the head is complete. APIError if the network fails."""
        try:
            while not self.status:
                self.opening = self.receive(self.sock.recv(RECV_SIZE))
        except (*NETWORK_ERRORS, APIError) as error:
            self.close()
            raise self.to_api_error(error) from error

    def to_api_error(self, error: Exception) -> APIError:
        """Translate an exception raised while receiving; raises the scope's cancel reason."""
        upstream_name = self.timeouts.upstream_name
        if isinstance(error, APIError):
            return error
        if self.reused and not self.has_begun and self.scope.reason is None:
            message = f"{upstream_name} broke off the connection."
            return APIError(502, message, code="connection", category=Category.RETRY)
        in_body = self.body is not NO_BODY
        failure = upstream_error(error, self.scope, upstream_name, in_body=in_body)
        if is_cut(error) or in_body and isinstance(error, ProtocolError):
            failure.category = Category.CUT
        return failure

    def make_nonblocking(self) -> int:
        """Let recv() not block if called with the flags returned.

        Where a flag is enough, the socket stays as it is: a system call that changes it lets go of
        the interpreter, for which all workers would then compete again.
        """
        if DONTWAIT and not hasattr(self.sock, "pending"):  # not TLS, which takes no flags
            return DONTWAIT
        self.sock.setblocking(False)
        return 0

    def reset_idle_deadline(self, started: bool = True) -> None:
        """Set the deadline of the next read, or of the first content until it has arrived."""
        timeouts = self.timeouts
        if started:
            self.scope.set_deadline(timeouts.idle, timeouts.idle_message)
        else:
            self.scope.deadline = self.first_byte_deadline
            self.scope.timeout_message = timeouts.first_byte_message

    def recv(self, started: bool = True) -> bytes:
        """Block for the next bytes of the socket."""
        self.reset_idle_deadline(started)
        data: bytes = self.sock.recv(RECV_SIZE)
        self.scope.deadline = math.inf  # a slow client must not count as a slow upstream
        return data

    def iter_bytes(self, started: bool = True) -> Iterator[bytes]:
        """Yield the payload of each read. APIError if the network fails or times out.

        Unless ``started``, all of it has to arrive before the deadline of the first content.
        """
        self.scope.deadline = math.inf
        payload = self.opening
        while True:
            if payload:
                yield payload
            if self.body.done:
                break
            try:
                payload = self.receive(self.recv(started))
            except NETWORK_ERRORS as error:
                raise self.to_api_error(error) from error
        self.close()

    def read(self, limit: int = MAX_BUFFERED_BODY) -> bytes:
        """Read the complete body. APIError 502 if it has more than ``limit`` bytes."""
        data = bytearray()
        try:
            for part in self.iter_bytes(started=False):
                data += part
                if len(data) > limit:
                    raise truncated(self.timeouts.upstream_name, f"sent more than {limit} bytes")
        finally:
            self.close()
        return bytes(data)

    def close(self) -> None:
        """Return the connection to the pool; after an incomplete response close it."""
        sock, self.sock = self.sock, None
        if sock is None:
            return
        self.scope.detach()
        if self.keep_alive and self.body.done and not self.body.trailing_data:
            self.pool.release(sock, keepalive_seconds(self.headers))
        else:
            sock.close()


class Timeouts:
    """Timeouts of one upstream, in seconds, each with its error message."""

    def __init__(self, upstream_name: str, first: float, idle: float) -> None:
        self.upstream_name, self.first, self.idle = upstream_name, first, idle
        self.connect_message = f"{upstream_name} could not be reached in time."
        self.first_byte_message = f"{upstream_name} did not answer within {first:g} seconds."
        self.idle_message = f"{upstream_name} sent nothing for {idle:g} seconds."


class Transport:
    """Sends requests to one upstream. Worker thread: it blocks.

    ``upstream_name`` is its name in error messages; ``headers`` are sent with each request, besides
    User-Agent and Accept-Encoding.
    """

    def __init__(
        self,
        options: ControllerSettings,
        settings: Settings,
        base: str,
        upstream_name: str,
        headers: dict[str, str],
    ) -> None:
        self.upstream_name = upstream_name
        first = options.first_byte_timeout or settings.first_byte_timeout
        idle, short = options.idle_timeout or settings.idle_timeout, settings.session_timeout
        self.timeouts = Timeouts(upstream_name, first, idle)
        self.short_timeouts = Timeouts(upstream_name, short, short)
        self.connect_timeout = options.connect_timeout or settings.connect_timeout
        self.base, self.proxy = base, options.proxy if options.proxy != "none" else ""
        self.connections = ConnectionPool(base, self.proxy, settings.ca_file)
        # Not build_opener(): that would follow redirects with the key attached, open file: and
        # ftp: URLs, and read the environment's proxies past the settings.
        self.opener = urllib.request.OpenerDirector()
        self.opener.addheaders = []
        self.opener.add_handler(self.connections)
        login = proxy_authorization(self.proxy) if self.connections.forwarded else {}
        defaults = {"User-Agent": settings.user_agent, "Accept-Encoding": "identity"}
        titled = {name.title(): value for name, value in {**defaults, **headers}.items()}
        self.headers = {"Host": urllib.parse.urlsplit(base).netloc, **login, **titled}

    def start_request(
        self,
        method: str,
        path: str,
        scope: CancelScope,
        data: bytes | bytearray | None = None,
        headers: dict[str, str] | None = None,
        short: bool = False,
        retry_reason: str = "",
    ) -> UpstreamResponse:
        """Send a request and return before its response arrives.

        A ``short`` response has to come within SESSION_TIMEOUT. With a ``retry_reason`` the
        connection is a new one. APIError 502, 503 or 504 if the request can't be sent.
        """
        timeouts = self.short_timeouts if short else self.timeouts
        fields = {**self.headers, **headers} if headers else self.headers
        url = self.base + path
        request = UpstreamRequest(method, url, fields, data, scope, timeouts, retry_reason)
        if self.connections.forwarded:
            request.set_proxy(self.proxy, "http")
        try:
            response: UpstreamResponse = self.opener.open(request, timeout=self.connect_timeout)
            return response
        except NETWORK_ERRORS as error:
            reason = connect_problem(error, self.connections.address[0], self.proxy)
            raise upstream_error(error, scope, self.upstream_name, reason) from error

    def fetch(self, method: str, path: str, scope: CancelScope, **options: Any) -> UpstreamResponse:
        """Send a request and wait for the head of its response; as start_request()."""

        def send(retry_reason: str) -> UpstreamResponse:
            response = self.start_request(method, path, scope, retry_reason=retry_reason, **options)
            response.read_head()
            return response

        return retrying(send)

    def get_json(
        self, path: str, scope: CancelScope | None = None, **options: Any
    ) -> tuple[UpstreamResponse, Any]:
        """GET a short answer within SESSION_TIMEOUT, and its body: None if it is not JSON."""
        response = self.fetch("GET", path, scope or CancelScope(), short=True, **options)
        return response, json_or_none(response.read(limit=MAX_SHORT_BODY))


def retrying(send: Callable[[str], T]) -> T:
    """Send a request, and repeat it after an error of the category RETRY.

    ``send(reason)`` gets the last error's code, or "" at first; a second error with that code is
    raised. Exchange.fail_over() does the same for a call.
    """
    reason = ""
    while True:
        try:
            return send(reason)
        except APIError as error:
            if error.category is not Category.RETRY or error.code == reason:
                raise
            reason = error.code or ""


NETWORK_ERRORS = (OSError, ProtocolError)


# Errors of a machine without descriptors, buffers or memory for another socket.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def is_exhausted(error: Exception) -> bool:
    """Return whether this machine's limits, not the upstream, caused a network error."""
    if isinstance(error, socket.gaierror):
        # Without a free descriptor the resolver reports an unknown host: try to open one.
        try:
            socket.socket().close()
        except OSError as cause:
            error = cause
    return isinstance(error, OSError) and error.errno in EXHAUSTED


exhaustion_logged_at = -math.inf  # by time.monotonic()


def log_exhaustion(message: str, error: Exception) -> None:
    """Log that this machine lacks resources, at most once in 10 seconds. Any thread."""
    global exhaustion_logged_at
    now = time.monotonic()
    if now >= exhaustion_logged_at + 10.0:
        exhaustion_logged_at = now
        log.error("%s: %s", message, error)


def upstream_error(
    error: Exception, scope: CancelScope, name: str, reason: str = "", in_body: bool = False
) -> APIError:
    """Translate a network exception; raises the scope's reason if it was cancelled.

    ``reason`` is its connect_problem(). ``in_body``: the head was complete, so a protocol error
    means a truncated response.
    """
    scope.raise_if_cancelled()
    if is_exhausted(error):
        log_exhaustion(
            "this server has no descriptors or memory left for connections to upstreams", error
        )
        message = "This server is out of resources for more requests."
        return APIError(503, message, code="overloaded", retry_after=1, category=Category.LOCAL)
    if not isinstance(error, NETWORK_ERRORS):
        return unexpected_error(error, name)
    tls_reason = "" if is_cut(error) else str(getattr(error, "reason", ""))
    if tls_reason and not reason:
        reason = f"TLS failed ({tls_reason.lower().replace('_', ' ')})"
    if reason:
        message = f"{name} could not be reached: {reason}."
        log.warning("%s", message)
    else:
        message = f"{name}{network_problem(error, in_body)}."
        log.info("%s: %s: %s", name, type(error).__name__, error)
    status = 504 if isinstance(error, (socket.timeout, TimeoutError)) else 502
    return APIError(status, message, category=Category.NETWORK, reason=reason)


def network_problem(error: Exception, in_body: bool) -> str:
    """End of an error message about a connection, after the upstream's name."""
    if isinstance(error, (socket.timeout, TimeoutError)):
        return " could not be reached in time"
    if isinstance(error, ProtocolError):
        cut = ": connection lost: it broke off its answer"
        return cut if in_body else ": it sent something that is not HTTP"
    if is_cut(error):
        return ": connection lost: it broke off the connection"
    return " could not be reached"


def is_cut(error: Exception) -> bool:
    """Return whether the peer has closed a connection, with TLS or without."""
    reason = getattr(error, "reason", "")  # Python 3.9 has no class for it
    is_eof = isinstance(error, RaggedEnd) or reason == "UNEXPECTED_EOF_WHILE_READING"
    return is_eof or isinstance(error, ConnectionError)


def unexpected_error(error: Exception, upstream_name: str) -> APIError:
    """Wrap a decoder's or controller's bug as a 502; Upstream.log_exception logs it."""
    failure = truncated(upstream_name, "failed unexpectedly")
    failure.bug = error
    return failure


def controller_error(error: Exception, name: str) -> APIError:
    """Return the APIError for an exception of a controller; raises ClientDisconnected."""
    if isinstance(error, ClientDisconnected):
        raise error
    return error if isinstance(error, APIError) else unexpected_error(error, name)


def truncated(upstream_name: str, problem: str = "") -> APIError:
    """Return the error for an incomplete answer, or for one with another problem."""
    # Some clients retry a broken stream only if its error has the words "connection lost".
    problem = f" {problem}" if problem else ": connection lost: it ended its answer early"
    return APIError(502, f"{upstream_name}{problem}.", category=Category.CUT)


# == 7. streams ===============================================================================
# Decodes a response as its bytes arrive: payload -> decoder -> filters -> events. Decoders neither
# read nor wait. Knows neither clients nor dialects.


Input = TypeVar("Input")


class Step(Generic[Input]):
    """Base class of decoders, which turn bytes into events, and of filters of events.

    feed() returns events as their input arrives, close() the remaining ones after a complete body,
    and flush() those that are still to be sent before an error that interrupts it.
    """

    error: APIError | None = None  # ends the answer, to be raised after the events returned
    started = False  # content has arrived, even without events
    complete = False  # the answer is complete; a Finish event says so as well
    stopped = False  # a filter has ended the answer, so the upstream should stop
    has_fast_path = False  # fast_path() may succeed

    def feed(self, data: Input) -> list[Event]:
        raise NotImplementedError

    def close(self) -> list[Event]:
        return []

    def flush(self) -> list[Event]:
        return []

    def fast_path(self, data: bytes) -> bytes:
        """Return mid-stream data that needs no parsing, or its text as JSON; else b""."""
        return b""

    def is_passthrough(self, text: str) -> bool:
        """Whether a filter passes text unchanged; it then counts as fed."""
        return False


Decoder = Step[bytes]
Filter = Step[list[Event]]


class DecoderChain(Decoder):
    """A decoder followed by filters."""

    def __init__(self, decoder: Decoder, *filters: Filter) -> None:
        self.decoder, self.filters = decoder, filters
        self.has_fast_path = decoder.has_fast_path

    def feed(self, data: bytes) -> list[Event]:
        events = self.decoder.feed(data)
        for step in self.filters:
            events = step.feed(events)
            self.stopped = self.stopped or step.stopped
        self.error = self.decoder.error
        return events + self.flush() if self.error else events

    def fast_path(self, data: bytes) -> bytes:
        encoded = self.decoder.fast_path(data)
        if encoded:
            text = encoded[1:-1].decode()
            for step in self.filters:
                if not step.is_passthrough(text):
                    return b""
        return encoded

    def close(self) -> list[Event]:
        events = self._through_filters(self.decoder.close())
        self.error = self.decoder.error
        return events

    def flush(self) -> list[Event]:
        return self._through_filters(self.decoder.flush())

    def _through_filters(self, events: list[Event]) -> list[Event]:
        """Return the last events after what the filters were holding back."""
        for step in self.filters:
            events = step.feed(events) + step.close()
        return events


class BufferedBody(Decoder):
    """Decoder of a body that can only be parsed when complete.

    ``parse(data)`` returns its events or raises the APIError that it describes. A body with
    ``is_error_body`` is parsed even if it is truncated, because its status already is the error.
    """

    started = True  # the first byte is content

    def __init__(
        self,
        parse: Callable[[bytes], list[Event]],
        limit: int = MAX_BUFFERED_BODY,
        is_error_body: bool = False,
    ) -> None:
        self.parse, self.limit, self.is_error_body = parse, limit, is_error_body
        self.data = bytearray()  # a list of small parts would take many times their size

    def feed(self, data: bytes) -> list[Event]:
        self.data += data
        if len(self.data) > self.limit:
            self.error = truncated("The upstream", TOO_LARGE)
        return []

    def close(self) -> list[Event]:
        try:
            return self.parse(bytes(self.data))
        except APIError as error:
            self.error = error
            return []

    def flush(self) -> list[Event]:
        if self.is_error_body and not self.error:
            self.close()
        return []


TOO_LARGE = "sent more than can be buffered"
MAX_TOOL_CALLS = 10000  # in one answer


def take_complete_lines(buffer: bytearray, data: bytes) -> bytes:
    """Append data to a buffer of lines; remove and return the complete lines."""
    # Only new data is scanned, as time must be linear. A final CR may be half of a CR LF.
    end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1
    if not end:
        buffer += data
        return b""
    lines = bytes(buffer) + data[:end] if buffer else data[:end]
    buffer[:] = data[end:]
    return lines


class EventLines:
    """Splits an event stream into events, as the WHATWG's HTML standard defines them.

    Lines end with CR LF, LF or CR; a byte order mark, comments and other fields are skipped. Beyond
    the standard, an event that is one whole JSON object ends where the next object begins, since
    some servers leave out the blank line between events; and a field "error" is an event.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()  # an incomplete line
        self.data: list[bytes] = []  # data lines of an incomplete event
        self.type = b""  # of this event
        self.size = 0  # bytes of memory that the data lines use
        self.bom_checked = self.after_cr = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (type, data) of each event that has data."""
        if self.after_cr or data.find(b"\r") >= 0:
            data = self._without_cr(data)
        if self.buffer:
            data = take_complete_lines(self.buffer, data)
        lines = data.split(b"\n")
        partial = lines.pop()
        if partial:
            self.buffer += partial
        if lines and not self.bom_checked:
            self.bom_checked = True
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for line in lines:
            if line.startswith(b"data:"):
                value = line[6:] if line.startswith(b"data: ") else line[5:]
                if self.data and self._is_complete_object() and value[:1] in b"{[":
                    yield self._take()
                self.data.append(value)
                self.size += len(line) + 64  # plus Python's overhead for a bytes object
            elif not line:
                if self.data:
                    yield self._take()
                self.type = b""
            elif line.startswith(b"event:"):
                self.type = line[6:].strip()[:100]
            elif line.startswith(b"error:"):
                yield b"error", line[6:]  # llama.cpp's before 2026

    def close(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the last event, whose blank line may be missing."""
        yield from self.feed(b"\n\n")

    def _is_complete_object(self) -> bool:
        first = self.data[0]
        return len(self.data) == 1 and first.startswith(b"{") and first.rstrip().endswith(b"}")

    def _take(self) -> tuple[bytes, bytes]:
        event = self.type, b"\n".join(self.data)
        self.data, self.size, self.type = [], 0, b""
        return event

    def _without_cr(self, data: bytes) -> bytes:
        """Replace CR LF and CR by LF, also a CR LF that was cut in two."""
        if self.after_cr and data.startswith(b"\n"):
            data = data[1:]
            self.after_cr = False
        if data:
            self.after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def too_many_calls(upstream_name: str) -> APIError:
    """Error for an answer with more than MAX_TOOL_CALLS tool calls."""
    return truncated(upstream_name, f"sent more than {MAX_TOOL_CALLS} tool calls")


class EventStream:
    """Events of one response, pushed by the loop or iterated by a worker thread.

    ``make_decoder(response)`` is called when the head is complete; it returns the decoder of the
    body or raises the APIError that the head stands for.
    """

    DRAIN_TIMEOUT = 1.0  # seconds for an upstream to end its message after a complete answer
    MAX_OPENING = 1024  # bytes of blanks before a body
    decoder: Any = None  # a Decoder, once the head is complete
    started = False  # the first content has arrived: now the idle timeout applies
    complete = False  # the answer is complete
    at_eof = False  # nothing more is to be read from the socket
    error: Exception | None = None  # ends the answer, to be raised after the events returned
    byte_budget = math.inf  # payload bytes still allowed

    def __init__(
        self, response: UpstreamResponse, make_decoder: Callable[[UpstreamResponse], Decoder]
    ) -> None:
        self.response, self.make_decoder = response, make_decoder

    def receive(self, data: bytes) -> list[Event]:
        """Return the events within bytes read from the socket; b"" is its end."""
        events: list[Event] = []
        response = self.response
        try:
            payload = response.receive(data)
            decoder = self.decoder
            if decoder is None:
                if not self._can_choose_decoder(payload):
                    return events
                payload = response.opening
                decoder = self.decoder = self.make_decoder(response)
            self.byte_budget -= len(payload)
            if self.byte_budget < 0:
                raise truncated(response.timeouts.upstream_name, TOO_LARGE)
            if payload and not self.complete:
                events = decoder.feed(payload)
                self.error = decoder.error
                if not self.started and (events or decoder.started):
                    self.started = True
                    response.scope.timeout_message = response.timeouts.idle_message
                if decoder.complete or events and type(events[-1]) is Finish:
                    self.mark_complete()
            if response.body.done:
                self.at_eof = True
                if not self.complete and not self.error:
                    events += decoder.close()
                    self.error = decoder.error
                    self.complete = bool(events) and isinstance(events[-1], Finish)
        except Exception as error:  # a decoder's bug is its upstream's failure, not the loop's
            events += self.on_network_error(error)
        return events

    def _can_choose_decoder(self, payload: bytes) -> bool:
        """Collect the body's opening; True once it is enough to choose a decoder."""
        response = self.response
        if not response.status:
            return False
        response.opening += payload
        return (
            response.opening.strip() != b""
            or response.status >= 300
            or response.body.done
            or len(response.opening) > self.MAX_OPENING
        )

    def mark_complete(self) -> None:
        """Let the upstream end its message, so that its connection can be reused."""
        self.started = self.complete = True
        self.error, self.at_eof = None, self.decoder.stopped  # an answer that a filter ended is cut
        name = self.response.timeouts.upstream_name
        self.response.timeouts = Timeouts(name, self.DRAIN_TIMEOUT, self.DRAIN_TIMEOUT)

    def on_network_error(self, error: Exception) -> list[Event]:
        """End an incomplete answer with an error; return the events held back."""
        self.at_eof = True
        if self.complete:
            return []
        try:
            self.error = self.response.to_api_error(error)
        except (APIError, ClientDisconnected) as reason:  # the scope was cancelled
            self.error = reason
        if not self.decoder:
            return []
        try:
            events: list[Event] = self.decoder.flush()
            self.error = self.decoder.error or self.error  # of an error's body
            return events
        except Exception as bug:  # the decoder may be what failed in the first place
            log.info("%s: %s: %s", self.response.timeouts.upstream_name, type(bug).__name__, bug)
            return []

    def __iter__(self) -> Iterator[Event]:
        """Read the socket in this thread and yield the events."""
        with contextlib.closing(self):
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


# Names of token counts in chat completions, by those of Anthropic, Responses and others.
COUNT_NAMES = {
    alias: name
    for name, aliases in {
        "prompt_tokens": "input_tokens promptTokens inputTokens",
        "completion_tokens": "output_tokens completionTokens outputTokens",
        "total_tokens": "",
        "cached_tokens": "prompt_cache_hit_tokens cache_read_input_tokens",
        "cache_write_tokens": "cache_creation_tokens cache_creation_input_tokens",
        "reasoning_tokens": "thinking_tokens",
    }.items()
    for alias in (name, *aliases.split())
}


def chat_usage(value: Any) -> dict[str, Any] | None:
    """Return a usage under the names of chat completions; None without both counts."""
    fields = as_dict(value)
    counts = token_counts(fields)
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if prompt is None or completion is None:
        return None
    if fields.get("prompt_tokens") is None:  # Anthropic counts cached tokens apart
        for name in ("cache_read_input_tokens", "cache_creation_input_tokens"):
            prompt += count_or_none(fields.get(name)) or 0
    total = counts.get("total_tokens") or prompt + completion
    reasoning = counts.get("reasoning_tokens")
    if reasoning and total == prompt + completion + reasoning:
        completion += reasoning  # xAI and others count reasoning apart
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    usage["total_tokens"] = total
    for name in ("cached_tokens", "cache_write_tokens", "reasoning_tokens"):
        kind = "completion" if name == "reasoning_tokens" else "prompt"
        if counts.get(name):
            details = usage.setdefault(f"{kind}_tokens_details", {})
            details[name] = min(counts[name], usage[f"{kind}_tokens"] - sum(details.values()))
    return {**usage, "estimated": True} if is_estimated(fields) else usage


def token_counts(fields: dict[str, Any]) -> dict[str, int]:
    """Return the counts of a usage, by their names in chat completions.

    Of several names or places of a count, the first above 0 rules; but the name in chat completions
    before any other, and the usage itself before its details.
    """
    counts: dict[str, int] = {}
    details = [fields[name] for name in fields if name.endswith("_tokens_details")]
    for source in map(as_dict, [*details, fields]):
        for alias in filter(COUNT_NAMES.__contains__, source):
            name, count = COUNT_NAMES[alias], count_or_none(source[alias])
            if count is not None and (not counts.get(name) or count and alias == name):
                counts[name] = count
    return counts


# == 8. filters ===============================================================================
# Steps between decoder and events: split characters, think tags, stop sequences. And estimates of
# tokens.


class SurrogateFilter(Filter):
    """Joins the halves of a character that were sent in two events.

    JSON can cut an emoji into two escapes, "\\ud83d" and "\\ude00", and some servers put them into
    two events. A half that stays alone becomes U+FFFD.
    """

    SURROGATE = re.compile("[\ud800-\udfff]")

    def __init__(self) -> None:
        self.pending: dict[Any, BlockEvent] = {}  # first halves, by type and index of the event

    def feed(self, events: list[Event]) -> list[Event]:
        texts = (text for text in map(text_of, events) if not text.isascii())
        if not self.pending and not any(map(self.SURROGATE.search, texts)):
            return events
        out: list[Event] = []
        for event in events:
            if isinstance(event, (Text, Reasoning, ToolCall)):
                out += self._join(event)
            else:
                out += [*self.close(), event]
        return out

    def is_passthrough(self, text: str) -> bool:
        return not self.pending and text.isascii()

    def close(self) -> list[Event]:
        pending, self.pending = self.pending, {}
        return [with_text(event, "\ufffd") for event in pending.values()]

    def _join(self, event: BlockEvent) -> list[Event]:
        key = type(event), getattr(event, "index", 0)
        before = self.pending.pop(key, None)
        text = (text_of(before) if before else "") + text_of(event)
        if "\ud800" <= text[-1:] <= "\udbff":
            self.pending[key] = with_text(event, text[-1])
            text = text[:-1]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if isinstance(event, ToolCall) and event.name is not None:
            return [dataclasses.replace(event, arguments=text)]
        return [with_text(event, text)] if text else []


class TextFilter(Filter):
    """Base class of filters of Text that hold back the possible start of a word.

    Subclasses append events to ``out``: in read() those of one Text, in release() what was held
    back, in finish() the last ones, in pass_on() others.
    """

    pending = ""  # text held back
    read: Callable[[Text], None]

    def feed(self, events: list[Event]) -> list[Event]:
        self.out: list[Event] = []
        for event in events:
            if self.stopped:
                break
            if isinstance(event, Text):
                self.read(event)
            elif isinstance(event, Finish):
                self.finish(event)
            else:
                if isinstance(event, TextWasReasoning):
                    self.release()
                self.pass_on(event)
        return self.out

    def close(self) -> list[Event]:
        self.out = []
        self.release()
        return self.out

    def release(self) -> None:
        text, self.pending = self.pending, ""
        if text:
            self.out.append(Text(text))

    def finish(self, finish: Finish) -> None:
        self.release()
        self.out.append(finish)

    def pass_on(self, event: Event) -> None:
        self.out.append(event)


class ThinkTagFilter(TextFilter):
    """Turns ``<think>...</think>`` in Text events into Reasoning events.

    Tags may be split anywhere. An opening tag counts only at the start, after blanks at most; later
    it is more likely a word of the answer. Some models omit it: a closing tag without one makes the
    text before it reasoning, unless it is in quotes; Text already passed on is corrected by
    TextWasReasoning. Without a closing tag, all that follows is reasoning. Newlines around tags
    are removed.
    """

    OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
    QUOTES = ("`", "'", '"')
    MAX_BLANKS = 256  # around a tag: pending text is copied with each fragment

    def __init__(self) -> None:
        self.pending = ""  # possibly the start of a tag, or of the newlines before one
        self.last_char = ""  # of the text passed on
        self.after_tag = False  # newlines are removed
        self.in_reasoning = self.started = self.closed = False  # by a tag, or by other text

    def feed(self, events: list[Event]) -> list[Event]:
        if len(events) == 1 and type(events[0]) is Text and self.is_passthrough(events[0].text):
            return events
        return super().feed(events)

    def is_passthrough(self, text: str) -> bool:
        if text and self.last_char and not self.after_tag and not self.pending and "<" not in text:
            self.last_char = text[-1]
            return True
        return False

    def read(self, event: Text) -> None:
        text, self.pending = self.pending + event.text, ""
        if not self.started:
            text = self._read_opening(text)
        if not self.closed and text:
            text = self._read_closing(text)
        self._emit(text)

    def release(self) -> None:
        text, self.pending = self.pending, ""
        self._emit(text)

    def _read_opening(self, text: str) -> str:
        """Return what follows an opening tag, or the text if there is none."""
        stripped = text.lstrip()
        if len(text) - len(stripped) <= self.MAX_BLANKS:
            if self.OPEN_TAG.startswith(stripped) and stripped != self.OPEN_TAG:
                self.pending = text
                return ""
            if stripped.startswith(self.OPEN_TAG):
                self.in_reasoning = self.after_tag = True
                text = stripped[len(self.OPEN_TAG) :]
        self.started = True
        return text

    def _read_closing(self, text: str) -> str:
        """Emit what precedes a closing tag; returns what follows it, or text without one."""
        before, tag, after = text.partition(self.CLOSE_TAG)
        if not tag:
            return self._hold_back(text)
        self.closed = True
        if self.in_reasoning:
            self._emit(self._without_line_breaks(before))
        elif (self.last_char + before)[-1:] in self.QUOTES:
            return text
        else:
            self.in_reasoning = not self.last_char
            self._emit(before.rstrip("\n"))
            if not self.in_reasoning:
                self.out.append(TextWasReasoning())
        self.in_reasoning, self.after_tag = False, True
        return after

    def _hold_back(self, text: str) -> str:
        """Hold back a possible closing tag, in reasoning with the newlines before it."""
        passed_on = text[: len(text) - partial_match_length(text, self.CLOSE_TAG)]
        if self.in_reasoning:
            passed_on = self._without_line_breaks(passed_on)
        self.pending = text[len(passed_on) :]
        return passed_on

    def _without_line_breaks(self, text: str) -> str:
        return text[: max(len(text.rstrip("\n")), len(text) - self.MAX_BLANKS)]

    def _emit(self, text: str) -> None:
        if self.after_tag:
            text = text.lstrip("\n")
            self.after_tag = not text
        if text and self.in_reasoning:
            self.out.append(Reasoning(text))
        elif text:
            self.last_char = text[-1]
            self.out.append(Text(text))


def partial_match_length(text: str, word: str) -> int:
    """Length of the longest proper prefix of a short word that the text ends with."""
    tail = text[max(0, len(text) - len(word) + 1) :]
    at = tail.find(word[0])
    while at >= 0 and not word.startswith(tail[at:]):
        at = tail.find(word[0], at + 1)
    return len(tail) - at if at >= 0 else 0


class StopFilter(TextFilter):
    """Ends answers at stop sequences and token limits the upstream does not support.

    Stop sequences are short, may be split anywhere and are not part of the answer. The one that
    ends first counts; of several that end together, the longest. Tokens are counted by
    token_units(), which never counts too many, so an answer is not cut short.
    """

    def __init__(self, stops: list[str], max_tokens: int | None) -> None:
        self.stops = stops
        self.budget = math.inf if max_tokens is None else UNITS_PER_TOKEN * max_tokens
        self.needed = bool(stops) or max_tokens is not None

    def read(self, event: Text) -> None:
        if not self.stops:
            self.pass_on(event)
            return
        text, self.pending = self.pending + event.text, ""
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self.stops if stop in text
        ]
        if found:
            end, _, stop = min(found)
            self.pass_on(Text(text[: end - len(stop)]))
            if not self.stopped:
                self.stopped = True
                self.out.append(Finish("stop", stop_sequence=stop))
        else:
            end = len(text)
            if token_units(text) <= self.budget:
                end -= max(partial_match_length(text, stop) for stop in self.stops)
            self.pending = text[end:]
            self.pass_on(Text(text[:end]))

    def pass_on(self, event: Event) -> None:
        """Count an event's text; beyond the limit it is cut, and the answer ends."""
        cost = token_units(text_of(event))
        if cost > self.budget:
            self.stopped = True
            if isinstance(event, (Text, Reasoning)):
                self.pass_on(type(event)(truncate_to(event.text, self.budget)))
            self.out.append(Finish("length"))
        elif cost or not isinstance(event, (Text, Reasoning)):
            self.budget -= cost
            self.out.append(event)


UNITS_PER_TOKEN = 24
_WIDE = re.compile("[\u2e80-\U0010ffff]+")


def token_units(text: str) -> int:
    """Lower bound of the tokens in a string, in units of 1/24 token.

    A token has at most 8 ASCII characters, 6 of other alphabets or 2 of East Asian scripts. The
    tokenizers cl100k and o200k average 4 to 7, 2 to 5 and 1 to 1.5 in prose.
    """
    if text.isascii():
        return len(text) * 3
    if len(text) > STRING_SLICE:  # bounds memory, and lets other threads run
        slices = range(0, len(text), STRING_SLICE)
        return sum(token_units(text[at : at + STRING_SLICE]) for at in slices)
    plain = len(text.encode("ascii", "ignore"))
    wide = len(text) - len(_WIDE.sub("", text))
    return plain * 3 + (len(text) - plain - wide) * 4 + wide * 12


IMAGE_TOKENS = 1600  # Anthropic's count for a large image


def estimate_tokens(value: Any) -> int:
    """Estimate a JSON value's tokens: twice the lower bound, IMAGE_TOKENS per file."""
    units, files, remaining = 0, 0, [value]
    while remaining:
        item = remaining.pop()
        if isinstance(item, dict):
            units += sum(map(token_units, item))
            if item.get("type") == "base64":
                files, item = files + 1, {**item, "data": None}
            remaining += item.values()
        elif isinstance(item, list):
            remaining += item
        elif isinstance(item, str) and item.startswith("data:"):
            files += 1
        elif item is not None:
            units += token_units(str(item))
    return tokens_of(units) + IMAGE_TOKENS * files


def tokens_of(units: int) -> int:
    """Estimate the tokens in so many token_units(): twice the lower bound."""
    return units * 2 // UNITS_PER_TOKEN + 1


def truncate_to(text: str, budget: float) -> str:
    """Longest prefix within a budget of token_units()."""
    for size, char in enumerate(text):
        budget -= token_units(char)
        if budget < 0:
            return text[:size]
    return text


# == 9. tools =================================================================================
# Tool calls as text, for models whose API has none: functions and history go into the prompt, calls
# are read from the answer. Knows events and JSON only.


class ToolForm(NamedTuple):
    """Templates (of the % operator) of a model family's calls and results."""

    models: re.Pattern[str]  # of their names in lower case
    call: str
    argument: str = ""  # one of them; "": all are one JSON object
    calls: str = "%s"  # around the calls of a message
    result: str = "<tool_response>\n%s\n</tool_response>"

    def write(self, *calls: tuple[Any, Any]) -> str:
        """Return the text of calls, which are (name, arguments as an object or its JSON)."""
        texts = []
        for number, (name, arguments) in enumerate(calls):
            arguments = arguments if isinstance(arguments, str) else _encode(arguments)
            if self.argument:
                fields = as_dict(json_or_none(arguments.encode("utf-8", "replace")))
                arguments = "".join(
                    self.argument % (key, value if isinstance(value, str) else _encode(value))
                    for key, value in fields.items()
                )
            texts.append(self.call % {"name": name, "arguments": arguments, "number": number})
        return self.calls % "\n".join(texts)


# By the first match. From the chat templates of moonshotai/Kimi-K2-Instruct, zai-org/GLM-4.5,
# deepseek-ai/DeepSeek-V3.1 and Qwen/Qwen3-Coder-480B-A35B-Instruct; meta-llama/llama-models,
# models/llama3_1/prompt_format.md; NousResearch/Hermes-Function-Calling, as Qwen2.5 and Qwen3.
# fmt: off
TOOL_FORMS = (
    ToolForm(re.compile("kimi-?k2"), "<|tool_call_begin|>functions.%(name)s:%(number)d"
             "<|tool_call_argument_begin|>%(arguments)s<|tool_call_end|>",
             calls="<|tool_calls_section_begin|>%s<|tool_calls_section_end|>"),
    ToolForm(re.compile("deepseek-?v3[.-]1"),
             "<｜tool▁call▁begin｜>%(name)s<｜tool▁sep｜>%(arguments)s<｜tool▁call▁end｜>",
             calls="<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>",
             result="<｜tool▁output▁begin｜>%s<｜tool▁output▁end｜>"),
    ToolForm(re.compile("glm-?(4[.-][5-9]|[5-9])"),
             "<tool_call>%(name)s\n%(arguments)s</tool_call>",
             "<arg_key>%s</arg_key>\n<arg_value>%s</arg_value>\n"),
    ToolForm(re.compile("qwen-?3.{0,40}coder"),
             "<tool_call>\n<function=%(name)s>\n%(arguments)s</function>\n</tool_call>",
             "<parameter=%s>\n%s\n</parameter>\n"),
    ToolForm(re.compile("llama-?(3[.-][1-3]|4)"), "<function=%(name)s>%(arguments)s</function>"),
    ToolForm(re.compile(""),
             '<tool_call>\n{"name": "%(name)s", "arguments": %(arguments)s}\n</tool_call>'),
)
OPENING_MARKS = (
    "<tool_call>", "<function=", "<|python_tag|>", "<|tool_calls_section_begin|>",
    "<|tool_call_section_begin|>", "<|tool_call_begin|>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
)
CLOSING_MARKS = (
    "</tool_call>", "</function>", "<|eom_id|>", "<|eot_id|>", "<|tool_call_end|>",
    "<|tool_calls_section_end|>", "<|tool_call_section_end|>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
ARGUMENT_MARKS = {"<parameter=": "</parameter>", "<arg_key>": "</arg_value>"}
# Around names and values; the words are of DeepSeek's "function<｜tool▁sep｜>" and of "```json".
SKIPPED = ("<｜tool▁sep｜>", "<|tool_call_argument_begin|>", "function", "json", *"`,;>")
TOOL_MARKS = (*OPENING_MARKS, *CLOSING_MARKS, *SKIPPED[:2], "<parameter=", "</parameter>",
              "<arg_key>", "</arg_value>")
# fmt: on
MARK, OPENING = ("|".join(map(re.escape, marks)) for marks in (TOOL_MARKS, OPENING_MARKS))
PARTIAL = "(?:%s)\\Z" % "|".join(re.escape(m[:n]) for m in TOOL_MARKS for n in range(1, len(m)))
# Tokens of text, of calls and of their strings. More text can't change them.
TEXT_TOKEN = re.compile(rf"{OPENING}|(?!{PARTIAL})[\s\S][^<]*")
CALL_TOKEN = re.compile(
    rf"{MARK}|(?!{PARTIAL})(?:[\w.:-]{{1,255}}(?![\w.:-]|\Z)|[\w.:-]{{256}}|\s+|[^\w.:-])"
)
STRING_TOKEN = re.compile(r"""\\[\s\S]|["'\x00-\x1f]|[^"'\\\x00-\x1f][^"'\\<\x00-\x1f]*""")
KIMI_NAME = re.compile(r"^functions\.|:\d*$")
NAMED_CALL = re.compile(r'{\s*"name"\s*:\s*"([^"\\{]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*{')
ARGUMENT = re.compile(
    r"(?:<parameter=([^<>]+)>\n?|<arg_key>([^<>]+)</arg_key>\s*<arg_value>)"
    r"([\s\S]*?)(?:\n?</parameter>|</arg_value>)"
)

TOOLS_PROMPT = (
    "You can call functions. Their signatures, as JSON:\n<tools>\n{tools}\n</tools>\n"
    "To call a function, write exactly this, once for each call, and then end your message:\n"
    "{call}\nIts JSON must be valid: no comments, no Markdown. You get the results in the next "
    "message; never write them yourself. Without need for a function, answer in plain text."
)
ONE_CALL, MUST_CALL = " Call at most one function.", " You must call a function now."
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")  # of a chat, which become text


class PromptedTools:
    """The tools of one chat: as text in its messages, and expected in its answer.

    ``ignored`` are the parameters that text can't hold. ``complaint`` is the error of an answer
    without a valid call, if the chat requires one.
    """

    def __init__(self, call: Call, model: str, prompt: str, upstream_name: str) -> None:
        self.call, self.prompt, self.upstream_name = call, prompt, upstream_name
        self.text_call = call  # with the tools as text, once they are translated
        self.complaint = ""
        self.form = next(form for form in TOOL_FORMS if form.models.search(model.lower()))
        self.single = call.body.get("parallel_tool_calls") is False
        tools = list(map(as_dict, as_list(call.body.get("tools"))))
        self.functions = {as_str(each.get("name")): each for each in map(function_of, tools)}
        self.functions.pop("", None)
        self.ignored = ["strict" for each in self.functions.values() if each.get("strict")]
        self.ignored += [str(tool.get("type")) for tool in tools if not function_of(tool)]
        self.required = self._choose(call.body.get("tool_choice"))

    def _choose(self, choice: Any) -> bool:
        """Apply ``tool_choice`` to the functions; whether one must be called."""
        if isinstance(choice, dict):
            allowed = as_dict(choice.get("allowed_tools"))
            chosen = map(function_of, as_list(allowed.get("tools")) or [choice])
            names = {as_str(function.get("name")) for function in chosen}
            self.functions = {n: each for n, each in self.functions.items() if n in names}
            choice = allowed.get("mode", "required")
        if choice == "none":
            self.functions = {}
        elif choice not in (None, "auto") and (choice != "required" or not self.functions):
            message = "'tool_choice' must be none, auto, required or one of 'tools'."
            raise bad_request(message, "tool_choice")
        return bool(choice == "required")

    def body(self) -> dict[str, Any]:
        """Return the chat without fields and roles for tools."""
        body = self.call.body
        messages = list(map(self._message, body["messages"]))
        if self.functions:
            if not messages or messages[0]["role"] not in ("system", "developer"):
                messages.insert(0, {"role": "system"})
            messages[0] = add_paragraph(messages[0], self._instruction())
        if self.complaint:
            messages.append({"role": "user", "content": self.complaint})
        others = {name: body[name] for name in body if name not in TOOL_FIELDS}
        return {**others, "messages": messages}

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its calls as text; a result becomes a message of the user."""
        if message["role"] == "tool":
            parts = as_list(message.get("content"))
            images = [part for part in parts if as_dict(part).get("type") != "text"]
            result = self.form.result % message_text(message)
            content = [{"type": "text", "text": result}, *images] if images else result
            return {"role": "user", "content": content}
        functions = map(function_of, as_list(message.get("tool_calls")))
        calls = [(each.get("name"), each.get("arguments") or {}) for each in functions]
        others = {name: message[name] for name in message if name != "tool_calls"}
        return add_paragraph(others, self.form.write(*calls)) if calls else others

    def _instruction(self) -> str:
        """Return the system message's text with the form of a call and the functions."""
        example = self.form.write(("FUNCTION", '{"PARAMETER":"VALUE"}'))
        functions = self.functions.values()
        tools = [_encode({"type": "function", "function": function}) for function in functions]
        text = self.prompt.replace("{call}", example).replace("{tools}", "\n".join(tools))
        return text + ONE_CALL * self.single + MUST_CALL * self.required


def function_of(tool: Any) -> dict[str, Any]:
    """Return the function in a tool or a call; {} if there is none."""
    return as_dict(as_dict(tool).get("function"))


def add_paragraph(message: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a message with a paragraph after its text, which is its content now."""
    return {**message, "content": f"{message_text(message)}\n\n{text}".lstrip()}


class ToolCallFilter(TextFilter):
    """Turns calls in Text events into ToolCall events, and think tags into Reasoning.

    Calls stand between marks, outside of Markdown code. They are held back until the second mark
    or the end of the answer, as all is text if it proves invalid: not JSON, of an unknown function,
    or followed by other text. In a stream, arguments above HELD characters are passed on as they
    arrive; if they then prove invalid, feed() raises an APIError, as it does to repeat a chat that
    requires a call.

    Generators read the answer token by token, of which the last one is "".
    """

    HELD, MAX_CALL = 256, 4 << 20  # characters

    def __init__(self, tools: PromptedTools) -> None:
        self.tools, self.think, self.code = tools, ThinkTagFilter(), MarkdownCode()
        self.pattern, self.json, self.pending = TEXT_TOKEN, LooseJSON(""), ""
        self.reader = self._read_answer()
        next(self.reader)
        self.tokens: list[str] = []  # since an opening mark
        self.calls: list[tuple[str, str]] = []  # complete ones among them: name and arguments
        self.size = 0  # of them and of those sent in parts, in characters
        self.count = 0  # of calls sent
        self.is_sent = False  # the beginning of the call that is read
        self.passed_on = False  # something of the answer

    def feed(self, events: list[Event]) -> list[Event]:
        out = super().feed(events)
        if self.tools.single:
            out = [event for event in out if not (isinstance(event, ToolCall) and event.index)]
        self.passed_on = self.passed_on or bool(out)
        return out

    def read(self, event: Text) -> None:
        text, at = self.pending + event.text, 0
        while not self.stopped:
            match = (STRING_TOKEN if self.json.quote else self.pattern).match(text, at)
            if not match:
                break
            at = match.end()
            self._read_token(match[0])
        self.pending = text[at:]
        if self.tools.call.stream and self.size > self.HELD:
            self._send_part()

    def finish(self, finish: Finish) -> None:
        if finish.reason == "length":
            self.release()
        else:
            for token in (self.pending, ""):
                self.pending = ""
                self._read_token(token)
        if not self.count:
            self._repeat("The answer has no tool call.")
        reason = "tool_calls" if self.count and finish.reason == "stop" else finish.reason
        self.out += self.think.feed([Finish(reason, finish.usage, finish.stop_sequence)])

    def release(self) -> None:
        self.tokens = [] if self.is_sent or self.stopped else [*self.tokens, self.pending]
        self.pending = ""
        self._emit_text()
        self.out += self.think.close()

    def _read_token(self, token: str) -> None:
        self.tokens.append(token)
        self.size += len(token)
        self.reader.send(token)
        # A closing think tag, of 8 tokens at most, ends what the reasoning says of calls.
        ends = self.think.in_reasoning and "</think>" in "".join(self.tokens[-8:])
        if ends or self.size > self.MAX_CALL:
            self.reader.throw(ValueError("it is too long"))

    def _read_answer(self) -> Generator[None, str, None]:
        """Read text and calls by turns."""
        while True:
            token = yield
            while token in OPENING_MARKS and not self.code.is_open():
                try:
                    self.pattern = CALL_TOKEN
                    token = yield from self._read_calls()
                except ValueError as error:
                    self._reject(error)
                    token, self.json = "", LooseJSON("")
                self.pattern = TEXT_TOKEN
            self._emit_text()

    def _reject(self, error: ValueError) -> None:
        """Make an invalid call text. Raises an APIError if a part of it has been sent."""
        if self.is_sent:
            self.stopped = True
            message = f"{self.tools.upstream_name} sent an invalid tool call."
            raise APIError(502, message, code="invalid_tool_call")
        is_reasoning = self.think.in_reasoning
        self._emit_text()
        if not is_reasoning:
            self._repeat(f"A tool call is invalid: {error}.")

    def _emit_text(self) -> None:
        """Pass on the tokens as text or, in think tags, as reasoning."""
        events = self.think.feed([Text("".join(self.tokens))])
        self.tokens, self.calls, self.size = [], [], 0
        self.code.feed("".join(text_of(event) for event in events if isinstance(event, Text)))
        self.out += events

    def _read_calls(self) -> Generator[None, str, str]:
        """Read and send calls between two marks; returns the token after closing marks."""
        token = yield from self._read_marked()
        # Some models omit the closing think tag: in reasoning, calls count that end the answer.
        while token and self.think.in_reasoning:
            if token in OPENING_MARKS:
                token = yield from self._read_marked()
            elif token in CLOSING_MARKS or token.isspace():
                token = yield
            else:
                raise ValueError("reasoning follows")
        self._send_calls()
        if self.tools.single and token:
            self.stopped = True
            self.out.append(Finish("tool_calls"))
        while token in CLOSING_MARKS or token.isspace():
            token = yield
            if token in CLOSING_MARKS:
                self.tokens.pop()
        if not token or token in OPENING_MARKS:
            self.tokens = [token]  # without blanks between and after calls
        return token

    def _read_marked(self) -> Generator[None, str, str]:
        """Read the calls between two marks; returns the second one. Raises ValueError."""
        functions, found, name = self.tools.functions, False, ""
        arguments: dict[str, Any] = {}
        while True:
            token = yield
            if token in ("{", "[") and not arguments:
                calls = yield from self._read_json(token, name)
                self.calls += calls
                found, name = True, ""
            elif token in ARGUMENT_MARKS and name:
                start = len(self.tokens) - 1
                while (yield) not in ("", ARGUMENT_MARKS[token]):
                    pass
                key, value = read_argument("".join(self.tokens[start:]), functions[name])
                arguments[key] = value
            elif not found and KIMI_NAME.sub("", token) in functions:
                found, name = True, KIMI_NAME.sub("", token)
            elif not (token.isspace() or token in SKIPPED or token in OPENING_MARKS and not found):
                break
        is_bare = name and not arguments  # needs a second mark
        if not found or token not in (*OPENING_MARKS, *CLOSING_MARKS) and (token or is_bare):
            raise ValueError("it has no valid JSON, or an unknown function")
        if name:
            self.calls.append((name, _encode(arguments)))
        return token

    def _read_json(self, token: str, name: str) -> Generator[None, str, list[tuple[str, str]]]:
        """Read an object or array; returns the calls in it that are still to be sent."""
        json = self.json = LooseJSON(name)
        json.feed(token)
        while json.depth:
            token = yield
            if not token or token in TOOL_MARKS and not json.quote:
                raise ValueError("it is not complete")
            json.feed(token)
        value = from_json("".join(json.tokens).encode())
        value = {"name": name, "arguments": value} if name else value
        calls = calls_of(value, self.tools.functions)
        if self.is_sent:
            self._send_part()
            calls, self.is_sent = [], False
        self.json = LooseJSON("")
        return calls

    def _send_part(self) -> None:
        """Send the arguments read since the last time, once the function's name is known."""
        json = self.json
        if json.part and json.name in self.tools.functions and not self.think.in_reasoning:
            if not self.is_sent:
                self.calls.append((json.name, ""))
                self._send_calls()
                self.is_sent = True
            self.out.append(ToolCall(self.count - 1, "".join(json.part)))
            json.part, self.tokens = [], []

    def _send_calls(self) -> None:
        self.out += self.think.close()
        self.think.started = self.think.closed = True  # think tags after a call are text
        for name, arguments in self.calls:
            if self.count == MAX_TOOL_CALLS:
                raise too_many_calls(self.tools.upstream_name)
            self.out.append(ToolCall(self.count, arguments, "call_" + new_id(), name))
            self.count += 1
        self.tokens, self.calls, self.size = [], [], 0

    def _repeat(self, reason: str) -> None:
        """Raise the error that repeats, once, a chat that requires a call."""
        tools, is_late = self.tools, self.passed_on and self.tools.call.stream
        if tools.required and not (tools.complaint or self.count or is_late):
            tools.complaint, self.stopped = reason + MUST_CALL, True
            raise APIError(502, reason, code="tools", category=Category.RETRY)


class LooseJSON:
    """Joins tokens to a JSON object or array and corrects slips of language models.

    Corrected are single quotes, raw line breaks in strings, trailing commas and Python's words.
    ``name`` is the called function's, ``part`` the tokens of its arguments since it was cleared.
    """

    WORDS = {"True": "true", "False": "false", "None": "null", "'": '"', "\\'": "'"}

    def __init__(self, name: str) -> None:
        self.name, self.arguments_depth = name, 1 if name else 0  # 0: unknown, or complete
        self.tokens: list[str] = []
        self.part: list[str] = []
        self.depth = 0
        self.quote = self.comma = ""  # the open string's quote; a comma that may be trailing

    def feed(self, token: str) -> None:
        self.tokens.append(self._corrected(token))
        if not self.name and self.depth == 2 and len(self.tokens) < 40:
            head = NAMED_CALL.fullmatch("".join(self.tokens))
            self.name, self.arguments_depth = (head[1], 2) if head else ("", 0)
        if self.arguments_depth:
            self.part.append(self.tokens[-1])
            if self.depth < self.arguments_depth:
                self.arguments_depth = 0

    def _corrected(self, token: str) -> str:
        if token == self.quote:
            self.quote = ""
            return '"'
        if self.quote:
            return self.WORDS.get(token, token) if token[0] == "\\" else _encode(token)[1:-1]
        if token.isspace():
            return token
        # A comma is kept until the next token shows whether it is a trailing one.
        comma, self.comma = self.comma, "," if token == "," else ""
        self.quote = token if token in ("'", '"') else ""
        self.depth += (token in "{[") - (token in "}]")
        return comma * (token not in "}]") + self.WORDS.get(token, token) * (token != ",")


def calls_of(value: Any, functions: Iterable[str]) -> list[tuple[str, str]]:
    """Return the calls in an object or array as (name, arguments). Raises ValueError."""
    calls = []
    for item in map(as_dict, value if value and isinstance(value, list) else [value]):
        item = function_of(item) or item
        name, arguments = str(item.get("name")), item.get("arguments", item.get("parameters"))
        if arguments and isinstance(arguments, str):
            arguments = from_json(arguments.encode())
        if name not in functions:
            raise ValueError(f"{name[:80]!r} is not a function")
        if arguments is None and set(item) - {"name", "id", "type", "arguments", "parameters"}:
            raise ValueError("it has no 'arguments'")
        if not isinstance(arguments or {}, dict):
            raise ValueError("its arguments are not a JSON object")
        calls.append((name, _encode(arguments or {})))
    return calls


def read_argument(text: str, function: dict[str, Any]) -> tuple[str, Any]:
    """Return the name and value of an argument between marks. Raises ValueError.

    The value has no quotes: it is JSON unless the function's schema wants a string.
    """
    argument = ARGUMENT.fullmatch(text)
    if not argument:
        raise ValueError("an argument is not complete")
    name, text = argument[1] or argument[2], argument[3]
    properties = as_dict(as_dict(function.get("parameters")).get("properties"))
    if may_be_string(as_dict(properties.get(name))):
        return name, text
    word = LooseJSON.WORDS.get(text, text)  # Qwen3-Coder's template has Python's
    value = json_or_none(word.encode("utf-8", "replace"))
    return name, text if value is None and word != "null" else value


def may_be_string(schema: dict[str, Any]) -> bool:
    """Whether a JSON schema allows strings by its type, or by one of several."""
    types = schema.get("type")
    others = map(as_dict, as_list(schema.get("anyOf")))
    return "string" in (types, *as_list(types)) or any(map(may_be_string, others))


class MarkdownCode:
    """Tracks whether streamed Markdown is in a code block, a code span or quotes."""

    # At the start of a line, or with no more than a language after it.
    FENCE = re.compile(r"(?:^[ \t>*+-]*(?=[`~]+[^`]*$)|[ \t](?=[`~]+\w*\s*$))(`{3,}|~{3,})")

    def __init__(self) -> None:
        self.fence, self.line = "", ""

    def feed(self, text: str) -> None:
        *lines, self.line = (self.line[-1000:] + text).split("\n")
        for mark in filter(None, map(self.FENCE.search, lines)):
            if mark[1].startswith(self.fence):
                self.fence = "" if self.fence else mark[1]

    def is_open(self) -> bool:
        in_span = len(re.findall("`+", self.line)) % 2 == 1
        return bool(self.fence) or in_span or self.line[-1:] in ("'", '"')


# == 10. controllers ==========================================================================
# The base class of all kinds of upstreams, and their caches. Knows no clients and no dialects.


IMAGE_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,200}")


class Controller:
    """Base class of upstreams: override events(), and others as supported.

    Methods run in worker threads and may block.
    """

    transport: Any = None  # a Transport, for upstreams that are reached by HTTP
    model_cache: Any = None  # a Cache of their list of models

    def __init__(self, options: ControllerSettings, settings: Settings) -> None:
        self.options, self.settings, self.name = options, settings, options.name

    def events(self, call: Call) -> Iterable[Event]:
        """Answer a call: an iterable of events or an EventStream. APIError if it fails."""
        raise NotImplementedError

    def check_support(self, call: Call) -> APIError | None:
        """Return an error if the upstream can never serve such a call, else None."""
        return None

    def upstream_model(self, model: str) -> str:
        """Return the upstream's name of a model."""
        return self.options.model_map.get(model, model)

    def models(self) -> list[dict[str, Any]]:
        """Return the offered models as OpenAI model objects."""
        return self.model_cache.get() if self.model_cache else []

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        """Fetch an image that an answer links to."""
        raise APIError(404, f"{self.name} has no images.")

    def metrics(self) -> dict[str, float]:
        """Return the controller's own metrics by their names in METRICS."""
        return {}

    def status(self) -> dict[str, Any]:
        """Return the controller's own fields in /status."""
        return {}

    def limit_is_over(self) -> bool | None:
        """Ask whether the rate limit of this account has ended; None if unknown."""
        return None

    def login_problem(self) -> str:
        """Ask for the state of the login; return what is wrong with it, or ""."""
        return ""

    def take_over(self, previous: Any) -> None:
        """Continue the state of a controller of the same account, before a reload."""

    def on_tick(self, now: float) -> None:
        """Close connections that have been idle for too long. Loop thread: must not block."""
        if self.transport:
            self.transport.connections.close_expired(now)

    def close(self) -> None:
        """Close all idle connections."""
        if self.transport:
            self.transport.connections.close()


def adapt_body(
    body: dict[str, Any], options: ControllerSettings, is_chat: bool
) -> tuple[dict[str, Any], list[str]]:
    """Apply ``drop``, ``rename`` and, to chats, ``set``; return dropped names, too.

    Without a change it is the same object. ``drop`` reaches into messages and their tool calls.
    """
    if not (options.drop or options.rename or options.set):
        return body, []
    dropped: list[str] = []
    remaining = _without_fields(body, options.drop, dropped)
    adapted = {options.rename.get(name, name): value for name, value in remaining.items()}
    if is_chat:
        adapted.update(options.set)
    return body if adapted == body else adapted, dropped


def _without_fields(
    value: Any,
    names: tuple[str, ...],
    dropped: list[str],
    within: tuple[str, ...] = ("messages", "tool_calls"),
) -> Any:
    """A body, or an object in its lists ``within``, without some fields."""
    if not isinstance(value, dict):
        return value
    dropped += (name for name in names if value.get(name) is not None and name not in dropped)
    remaining = {name: field for name, field in value.items() if name not in names}
    for name in within[:1]:
        if isinstance(remaining.get(name), list):
            remaining[name] = [
                _without_fields(part, names, dropped, within[1:]) for part in remaining[name]
            ]
    return remaining


def place_system_messages(messages: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Leave one system message, at the beginning: many models accept no other one.

    Later ones are merged into it ("first") or into the user's text ("user"); the latter leaves
    the beginning unchanged, as upstreams' prompt caches need it.
    """
    leading = list(itertools.takewhile(_is_system, messages))
    later = messages[len(leading) :]
    if mode == "first":
        leading += filter(_is_system, later)
        later = list(itertools.filterfalse(_is_system, later))
    else:
        later = join_user_messages(
            _reminder(message) if _is_system(message) else message for message in later
        )
    return [*_join_messages("system", leading), *later]


def join_user_messages(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive messages of the user: many models need roles to alternate."""
    groups = itertools.groupby(messages, key=lambda message: message["role"])
    return [
        message
        for role, group in groups
        for message in (_join_messages(role, list(group)) if role == "user" else group)
    ]


def _is_system(message: dict[str, Any]) -> bool:
    return message["role"] == "system" and "tool_calls" not in message


def _reminder(message: dict[str, Any]) -> dict[str, Any]:
    """A system message as one of the user."""
    content = message.get("content") or ""
    if isinstance(content, str):
        content = f"<system-reminder>\n{content}\n</system-reminder>"
    return {"role": "user", "content": content}


def _join_messages(role: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join messages to one, if there are any."""
    contents = [message.get("content") or "" for message in messages]
    if len(contents) < 2:
        return messages
    if all(isinstance(content, str) for content in contents):
        return [{"role": role, "content": "\n\n".join(contents)}]
    parts = [
        part
        for content in contents
        for part in (content if isinstance(content, list) else [{"type": "text", "text": content}])
    ]
    return [{"role": role, "content": parts}]


class ToolAdapter:
    """Adds the settings prompt and refuse of ``tools`` to a controller."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.name = controller, controller.name
        self.options, self.settings = controller.options, controller.settings

    def check_support(self, call: Call) -> APIError | None:
        if self.options.tools == "refuse" and call.body.get("tools"):
            message = f"{self.name} does not support 'tools'."
            return bad_request(message, "tools", "unsupported_parameter")
        if self.options.tools == "refuse" or not has_tools(call):
            return self.controller.check_support(call)
        model = self.controller.upstream_model(call.model)
        prompt = self.settings.tools_prompt or TOOLS_PROMPT
        try:
            tools = PromptedTools(call, model, prompt, self.name)
        except APIError as error:
            return error
        call.prepared_requests[self.name] = tools
        return self._translate(tools)

    def _translate(self, tools: PromptedTools) -> APIError | None:
        """Put tools into the text of their call; an error if it is not supported."""
        body = tools.body()
        body["messages"] = join_user_messages(body["messages"])
        tools.text_call = text_call = copy.copy(tools.call)
        text_call.body, text_call.prepared_requests = body, {}
        text_call.original = copy.copy(tools.call.original)
        text_call.original.path = ""
        return self.controller.check_support(text_call)

    def events(self, call: Call) -> Iterable[Event]:
        tools = call.prepared_requests.get(self.name)
        if not isinstance(tools, PromptedTools):
            return self.controller.events(call)
        error = self._translate(tools) if tools.complaint else None
        if error:
            raise error
        tools.text_call.attempt = call.attempt
        response = self.controller.events(tools.text_call)
        call.attempt.ignored_params = [*call.attempt.ignored_params, *tools.ignored]
        if not tools.functions:
            return response
        step = ToolCallFilter(tools)
        if not isinstance(response, EventStream):
            return (out for event in response for out in step.feed([event]))
        make_decoder = response.make_decoder
        response.make_decoder = lambda head: filtered(make_decoder(head), step)
        return response


def has_tools(call: Call) -> bool:
    """Whether a chat offers tools, or has had calls."""
    is_chat = not (call.relay_only or call.image_count or call.translation_error)
    return is_chat and (
        bool(call.body.get("tools"))
        or any(item.get("tool_calls") or item["role"] == "tool" for item in call.body["messages"])
    )


def filtered(decoder: Decoder, step: ToolCallFilter) -> Decoder:
    """Return the decoder of an answer with a filter of tool calls and think tags."""
    if isinstance(decoder, BufferedBody) and decoder.is_error_body:
        return decoder
    chain = decoder if isinstance(decoder, DecoderChain) else DecoderChain(decoder)
    filters = [step if isinstance(each, ThinkTagFilter) else each for each in chain.filters]
    chain.filters = tuple(filters if step in filters else [*filters, step])
    chain.started = decoder.started
    return chain


@dataclass(eq=False)
class Cache(Generic[T]):
    """A value with a lifetime; one caller at a time fetches it. Any thread.

    ``fetch`` returns the value and its lifetime in seconds. If it ``expires``, it ends with that
    time, and a thread replaces it during the last fifth. Otherwise it is used until a caller that
    finds it old has replaced it, and a failure without any value is repeated for ``retry`` seconds.
    """

    RETRY = 15.0  # seconds between two attempts to replace a value

    name: str
    fetch: Callable[[], tuple[T, float]]
    clock: Callable[[], float] = time.monotonic
    expires: bool = False
    retry: float = RETRY
    value: T | None = None
    failure: APIError | None = None  # of the last fetch
    lock: threading.Lock = field(default_factory=threading.Lock)  # held during a fetch
    refresh_at = expires_at = failed_at = -math.inf  # the last one by time.monotonic()
    fetch_count = 0

    def get(self, scope: CancelScope | None = None) -> T:
        """Return the value. May block; raises the fetch's APIError, or the scope's reason."""
        arrived_at, now, value = time.monotonic(), self.clock(), self.value
        if value is None or now >= self.expires_at:
            return self._wait(value, arrived_at, scope or CancelScope())
        if now >= self.refresh_at and self.lock.acquire(blocking=False):
            if not self.expires:
                self._refresh()
                return self.value or value
            if not start_thread(self._refresh, self.name):
                self.lock.release()
        return value

    def invalidate(self, value: T) -> None:
        """Discard a value that the server has rejected."""
        # Requests A and B fail with the same value; A fetches a new one, which B must not discard.
        if self.value == value:
            self.value = None

    def _wait(self, old: T | None, arrived_at: float, scope: CancelScope) -> T:
        """Fetch a value, or wait for another caller to replace ``old`` or to fail."""
        while not self.lock.acquire(timeout=0.25):  # a cancelled caller must not wait for others
            scope.raise_if_cancelled()
        try:
            repeated = not self.expires and self.clock() < self.refresh_at
            if self.failure and (repeated or self.failed_at >= arrived_at):
                # otherwise each caller would add its frames, with the request, to the traceback
                raise self.failure.with_traceback(None)
            value = self.value
            return self._replace() if value is None or value == old else value
        finally:
            self.lock.release()

    def _refresh(self) -> None:
        """Replace a value still in use. The caller holds the lock; it is released."""
        try:
            self._replace()
        except APIError as error:
            log.warning("%s not refreshed, still using the old: %s", self.name, error.message)
        finally:
            self.lock.release()

    def _replace(self) -> T:
        """Fetch a value. The caller holds the lock."""
        now = self.clock()
        self.refresh_at = now + self.retry  # if it fails
        try:
            value, seconds = self.fetch()
        except APIError as error:
            self.failure, self.failed_at = error, time.monotonic()
            raise
        self.failure, self.value = None, value
        self.refresh_at = now + (seconds * 0.8 if self.expires else seconds)
        self.expires_at = now + seconds if self.expires else math.inf
        self.fetch_count += 1
        return value


# Names of the length of a model's context, in lower case without "_" and "-". A nested name may
# follow that of its object: {"context": {"length": 8192}}.
CONTEXT_NAMES = re.compile(
    r"(?:(?:max|loaded|total)?(?:context|sequence)"
    r"(?:length|len|window|size|limit|max|maxtokens|tokens|windowtokens|windowsize)?"
    r"|maxmodellen|maxseqlen|(?:max)?(?:input|prompt)?tokenlimit"
    r"|max(?:input|prompt)tokens|inputtokens|nctx|numctx)"
)


def context_length(entry: Any, prefix: str = "", depth: int = 4) -> int | None:
    """A model's context length in tokens, by its entry in a model list; or None.

    Outer fields take precedence over nested ones, "context" over other names, and the length with
    which a model was loaded over what it could have.
    """
    items = enumerate(entry) if isinstance(entry, list) else as_dict(entry).items()
    fields = list(itertools.islice(items, 64))
    names = {name: re.sub("[_-]", "", str(name)[:64]).lower() for name, _ in fields}

    def rank(item: tuple[Any, Any]) -> tuple[bool, ...]:
        return tuple(word not in names[item[0]] for word in ("context", "loaded"))

    for name, value in sorted(fields, key=rank):
        length = token_count(value)
        if length and any(map(CONTEXT_NAMES.fullmatch, (names[name], prefix + names[name]))):
            return length
    nested = (context_length(value, names[name], depth - 1) for name, value in fields if depth)
    return next(filter(None, nested), None)


def token_count(value: Any) -> int:
    """A positive number of tokens, also one in a string; 0 for anything else."""
    is_text = isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value)
    if is_text or type(value) is float and value.is_integer():
        value = int(value)
    return count_or_none(value) or 0


def with_context_length(model: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A model object with the context length in an entry of an upstream's list."""
    length = context_length(entry)
    others = {name: value for name, value in model.items() if name not in CONTEXT_FIELDS}
    return {**others, **dict.fromkeys(CONTEXT_FIELDS, length)} if length else others


MAX_MODELS = 10_000


def bounded_model_list(
    upstream_name: str, entries: Iterable[tuple[Any, dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Return a model list's entries by valid name, at most MAX_MODELS of them."""
    models: dict[str, dict[str, Any]] = {}
    for name, entry in entries:
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME:
            models.setdefault(name, entry)
        if len(models) > MAX_MODELS:
            models.popitem()
            log.warning("%s lists more than %d models; using the first", upstream_name, MAX_MODELS)
            break
    return models


# == 11. failures =============================================================================
# What an upstream's error means, how long to wait, and which secrets it must not reveal.


class ErrorRule(NamedTuple):
    """A row of UPSTREAM_ERRORS: matches errors of upstreams and classifies them.

    It matches if the status is one of ``statuses`` (empty: any) and ``codes`` is found in the
    error's codes or ``words`` in its message (both empty: any). Both are regular expressions for
    lower-case text. Where a status alone says little and a message may quote the client, ``words``
    is anchored: otherwise a model named "invalid key" could mark this server's key as invalid.
    """

    statuses: tuple[int, ...]
    codes: str
    words: str
    category: Category
    status: int = 0  # for the client; 0: the upstream's own
    reason: str = ""  # for Category.AUTH: the beginning of the message

    def matches(self, status: int, codes: str, words: str) -> bool:
        if self.statuses and status not in self.statuses:
            return False
        in_codes = self.codes and re.search(self.codes, codes)
        in_words = self.words and re.search(self.words, words)
        return bool(in_codes or in_words or not (self.codes or self.words))


# fmt: off
_KEY = "the upstream refuses this server's key"
_QUOTA = "the quota of this server's key is spent"
_KEY_CODES = (r"invalid_api_key|api_key_invalid|wrong_api_key|token_not_found_in_db|expired_key"
    r"|account_deactivated|organization_restricted|api_key_\w{1,40}_blocked|consumer_\w{1,20}"
    r"|unsupported_country|ip_not_authorized")
_KEY_WORDS = (r"^(?:incorrect api key|api[ _]key (?:not valid|not found|expired)|invalid x-api-key"
    r"|user location is not supported|this organization has been disabled|login fail"
    r"|[\w ]{0,20}free tier is not available)")
_LIKELY_KEY_WORDS = (r"(?:invalid|incorrect|wrong|missing|expired|revoked|bad|no)\b[\w -]{0,20}"
    r"(?:key\b|token\b|credential|authentication)"
    r"|(?:key|token|credential|account|organi[sz]ation|project|workspace|team)s?\b.{0,60}"
    r"(?:invalid|incorrect|not valid|expired|revoked|leaked|disabled|deactivated|suspended"
    r"|terminated|banned|archived|denied access(?! to))"
    r"|missing scopes|scope requirement|access.{0,20}terminated|country, region|\bip address\b"
    r"|virtual network|封禁")
_FORBIDDEN_KEY_WORDS = (
    r"api[ _-]?key|credential|unauthori[sz]ed|authentication|authorization failed"
    r"|unregistered callers|has not been used in project|public access is disabled")
_QUOTA_CODES = (r"insufficient_?(?:quota|balance|credit)|exceeded_current_quota"
    r"|billing_(?:error|hard_limit|not_active)|budget_?exceeded|payment_required|creditserror"
    r"|spend_limit|blocked_api_access|arrearage|not_enough_balance|\b1113\b")
_QUOTA_WORDS = (r"^(?:your credit balance is too low|insufficient (?:balance|credit|funds)"
    r"|your team (?:[\w-]{1,40} )?has either used all available credits"
    r"|you have reached your specified|budget has been exceeded|余额不足|您的账户已欠费)")
_LIKELY_QUOTA = (r"quota|billing|credit|balance|payment|insufficient funds|spending|arrears|budget"
    r"|(?:key|usage|monthly) limit|余额|欠费|额度")
_MODEL_CODES = (
    r"model_?not_?(?:found|available|supported)|model_(?:access_denied|decommissioned|terms)"
    r"|(?:unknown|invalid)_model|deploymentnotfound|\b1211\b")
_NO_MODEL = (r"\bmodels?\b.{0,200}(?:\bnot (?:exist|found)|does ?n[o']t exist|unknown)|模型不存在"
    r"|^(?:\w{1,20}: )?(?:unknown|invalid|no such|unsupported) model\b|invalid model name"
    r"|is not a valid model|model identifier is invalid")
_MODEL_ACCESS = _NO_MODEL + (
    r"|\bmodels?\b.{0,200}(?:\bnot |denied|unavailable|unsupported|restricted|only available"
    r"|requires)"
    r"|(?:access|permi|allowed|authori[sz]ed|entitled|eligible|verified|unknown|invalid"
    r"|unsupported|no such|available|support|subscribe|upgrade|\buse\b).{0,120}\bmodels?\b")
_FLAGGED = (r"flagged|moderat|content.?(?:policy|filter|management|violation|safety|exists risk)"
    r"|guardrail|unsafe|harmful|sensitive|prohibited.(?:content|due|use)|usage polic|safety"
    r"|inappropriate|terms of service|(?:blocked|deny-?listed) (?:input|output|token)")
_OVERSIZED = (r"^request too large|input or output tokens must be reduced"
    r"|tokens allowed per request|long context requests|reduce the (?:length|size) of (?:the|your)"
    r"|fewer max_tokens|can only afford|prompt tokens limit exceeded")
_OVERFLOW = (
    r"context (?:length|size|window|limit)|context the overflows|maximum (?:prompt|input|model)"
    r" length|(?:prompt|input) (?:is )?too long|token limit|token count|range of input length"
    r"|tokens \+ .{1,20} must be <=")
OVERFLOW_RULE = ErrorRule(
    (400, 413, 422, 500), "context_?(?:length|window)_?exceeded|exceed_context_size", _OVERFLOW,
    Category.REQUEST, 400)
# The first matching row applies. Columns: statuses, codes, words, category, status, reason.
UPSTREAM_ERRORS = [
    # The request asks for more tokens than are left, or than are allowed at once.
    ErrorRule((402, 403, 429), "", _OVERSIZED, Category.REFUSED),
    ErrorRule((413,), "rate_limit_exceeded", "tokens per minute", Category.REFUSED),
    OVERFLOW_RULE,
    # A firewall's page: something in the request matched one of its patterns.
    ErrorRule((402, 403, 451), "web_page", "", Category.REFUSED),
    # This server's key or address, beyond doubt.
    ErrorRule((), _KEY_CODES, _KEY_WORDS, Category.AUTH, reason=_KEY),
    ErrorRule((), _QUOTA_CODES, _QUOTA_WORDS, Category.AUTH, reason=_QUOTA),
    # The request's model or content.
    ErrorRule((400, 401, 500, 503), _MODEL_CODES, "", Category.MODEL, 404),
    ErrorRule((401, 403), "service_disabled", _LIKELY_KEY_WORDS, Category.AUTH, reason=_KEY),
    ErrorRule((400,), "", _NO_MODEL, Category.MODEL, 404),
    ErrorRule((401,), "", _MODEL_ACCESS, Category.MODEL, 404),
    ErrorRule((402, 403), _MODEL_CODES, _MODEL_ACCESS, Category.REFUSED),
    ErrorRule((401, 402, 403, 498), _FLAGGED, _FLAGGED, Category.REFUSED, 403),
    # This server's key, probably.
    ErrorRule((401, 402, 403, 412), _LIKELY_QUOTA, _LIKELY_QUOTA, Category.AUTH, reason=_QUOTA),
    ErrorRule((403,), "unauthenticated", _FORBIDDEN_KEY_WORDS, Category.AUTH, reason=_KEY),
    ErrorRule((401,), "", "", Category.AUTH, reason=_KEY),
    ErrorRule((402,), "", "", Category.AUTH, reason=_QUOTA),
    # Everything else, by its status.
    ErrorRule((403, 451), "", "", Category.REFUSED),
    ErrorRule((404,), "", "", Category.MODEL),
    ErrorRule((408, 409, 425, 429), "", "", Category.RATE_LIMIT),
    ErrorRule((498,), "", "", Category.RATE_LIMIT, 429),  # Groq: "capacity exceeded"
    ErrorRule((400, 413, 422), "", "", Category.REQUEST),
    ErrorRule((501, *range(400, 500)), "", "", Category.UNSUPPORTED),
    ErrorRule((503, 529), "", "", Category.SERVER, 503),
    ErrorRule(tuple(range(500, 600)), "", "", Category.SERVER, 502),
    ErrorRule((), "", "", Category.UNSUPPORTED, 502),
]

# Statuses of errors that come without one: within a stream, or within the messages of LiteLLM.
# "RateLimitError", "rate_limit_error" and "RESOURCE_EXHAUSTED" are looked up in lower case,
# without "_" and a final "error".
NAMED_STATUS = {
    name: status
    for status, names in {
        400: "badrequest invalidrequest invalidargument failedprecondition contextwindowexceeded"
             " contextlengthexceeded contentpolicyviolation unsupportedparams rejectedrequest",
        401: "authentication unauthenticated unauthorized invalidapikey",
        402: "billing insufficientquota insufficientcredits paymentrequired budgetexceeded",
        403: "permission permissiondenied forbidden",
        404: "notfound modelnotfound",
        413: "requesttoolarge",
        422: "unprocessableentity",
        429: "ratelimit ratelimitexceeded ratelimited toomanyrequests resourceexhausted"
             " routerratelimit routerratelimiterrorbasic",
        500: "api internal internalserver server apiconnection apiresponsevalidation"
             " jsonschemavalidation",
        503: "serviceunavailable unavailable midstreamfallback",
        504: "timeout deadlineexceeded",
        529: "overloaded",
    }.items()
    for name in names.split()
}
# fmt: on
# The same by the beginning of a message, for errors without such a name.
WORDED_STATUS = {
    401: "^(?:login fail|invalid api.?key|unauthori[sz]ed|authentication)",
    429: "^.{0,60}(?:rate.?limit|too many requests|limit (?:reached|exceeded))",
    502: "",
}
# Codes of errors that come without one.
DEFAULT_CODES = {Category.MODEL: "model_not_found", Category.UNSUPPORTED: "upstream_error"}


def error_from_body(
    upstream_name: str,
    status: int,
    body: Any,
    secrets: Iterable[str] = (),
    headers: dict[str, str] | None = None,
    models: Iterable[str] = (),
) -> APIError:
    """Translate an upstream's error response, by UPSTREAM_ERRORS.

    ``status`` 200: it came in place of an answer. ``body`` is a JSON value, or bytes that are not
    JSON. ``secrets`` are not shown. ``models`` are the names of the requested model.
    """
    body = page_or_text(body) if isinstance(body, bytes) else body
    fields = error_fields(body)
    words, codes = error_words(fields), error_codes(fields)
    actual = error_status(status, fields, words)
    given = to_json(body).decode()[:300] if body else ""
    text = inner_message(words) or given or f"It answered with status {actual}."
    unquoted = _without_quotes(text, models)
    rule = next(rule for rule in UPSTREAM_ERRORS if rule.matches(actual, codes, unquoted))
    is_limit = rule.category is Category.RATE_LIMIT
    wait = retry_after_seconds(headers or {}, body, message=words, limit=is_limit)
    if rule.category is Category.SERVER and wait:  # one that says when to retry is a limit
        rule, is_limit = rule._replace(category=Category.RATE_LIMIT), True
    names = {  # the upstream's own; LiteLLM repeats the status as the code
        name: redact(fields[name][:1000], secrets)[:200]
        for name in ("type", "code", "param")
        if isinstance(fields.get(name), str) and not re.fullmatch("[0-9]{3}", fields[name])
    }
    error = _shown_error(upstream_name, rule, actual, redact(text[:4000], secrets)[:1000], names)
    if rule is OVERFLOW_RULE:
        error.overflow = parse_overflow(text[:4000].lower())
        error.code = "context_length_exceeded"
    error.retry_after = wait if is_limit else None
    error.upstream_status = actual if status == 200 else status
    if _is_of_model(is_limit, words, body, models):
        error.cooldown_scope = "model"
    return error


def _shown_error(
    upstream_name: str, rule: ErrorRule, status: int, message: str, names: dict[str, str]
) -> APIError:
    """Only errors that are not the client's own begin with the upstream's name."""
    category, is_page = rule.category, names.get("type") == "web_page"
    if category is Category.AUTH:
        # LiteLLM as a client retries any message with "429" in it, in vain if a quota is spent.
        note = f" ({status})" if rule.reason != _QUOTA else ""
        return auth_error(f"{upstream_name}: {rule.reason}{note}: {message}", status)
    code = names.get("code") or DEFAULT_CODES.get(category)
    if category not in (Category.REQUEST, Category.REFUSED) or is_page:
        message, names = f"{upstream_name}: {message}", {}
    return APIError(
        rule.status or status,
        message,
        type=names.get("type", ""),
        code="upstream_blocked" if is_page and category is Category.REFUSED else code,
        param="model" if category is Category.MODEL else names.get("param"),
        category=category,
        retry=False if category is Category.REFUSED else None,
    )


def auth_error(message: str, status: int) -> APIError:
    """Error for rejected credentials of this server.

    Status 424, because SDKs retry 5xx and present 401 and 403 as errors of the client's own token.
    """
    return APIError(
        424,
        message,
        code="upstream_auth",
        category=Category.AUTH,
        retry=False,
        upstream_status=status,
    )


_MODEL_LIMIT = (
    r"\bmodel ?[:=`'\"\\]|this model|(?:per|by)model"
    r"|rate limit reached for (?!org|team|user|proj|key|api|your|acc|def|req|tok|[rt]p[mdh]\b"
    r"|in |on )\w"
)


def _is_of_model(is_limit: bool, words: str, body: Any, models: Iterable[str]) -> bool:
    """Whether only the requested model is to cool down, not the controller."""
    if not is_limit:  # LiteLLM's own authentication errors: its key for this model is invalid
        return "litellm.Auth" in words
    text = f"{words[:2000]} {_encode(body)[:8000]}".lower()
    return bool(re.search(_MODEL_LIMIT, text)) or any(
        re.search(rf"(?<!\w){re.escape(name.lower()[:MAX_NAME])}(?!\w)", text)
        for name in models
        if len(name) > 2
    )


def page_or_text(data: bytes) -> Any:
    """Parse an error body that is not JSON: a string, or an object for a web page."""
    text = data[:4000].decode("utf-8", "replace").strip()
    if not re.match(r"<(?:!doctype|html|head|body|\?xml)\b", text, re.I):
        return text
    title = re.search(r"<title[^>]{0,80}>([^<]{1,200})", text, re.I)
    page = f"a web page: {title[1].strip()}" if title else "a web page"
    return {"type": "web_page", "message": f"It answered with {page}."}


def error_fields(body: Any, depth: int = 6) -> dict[str, Any]:
    """Find the error object within an error body of any common shape.

    {"error": {...}}, {"error": "..."}, {"errors": [...]}, {"detail": ...},
    {"object": "error", ...}, a list of those, or a string that contains one as JSON. Other
    strings become {"message": ...}.
    """
    if isinstance(body, list):
        body = body[0] if body else None
    if isinstance(body, str):
        looks_like_json = depth and body.lstrip()[:1] in ("{", "[")
        parsed = json_or_none(body.encode("utf-8", "replace")) if looks_like_json else None
        is_object = isinstance(parsed, (dict, list))
        return error_fields(parsed, depth - 1) if is_object else {"message": body}
    fields: dict[str, Any] = as_dict(body)
    names = ("error", "errors", "base_resp")  # the last one is MiniMax's
    choice = as_dict(next(iter(as_list(fields.get("choices"))), None))  # OpenRouter's
    given = (*map(fields.get, names), choice.get("error"))
    inner, message = next(filter(None, given), None), fields.get("message")
    if isinstance(message, str) and not isinstance(inner, (dict, list)):
        # {"statusCode": 401, "error": "Unauthorized", "message": "..."}, or the body of another
        # provider as the message
        inner = message if message.lstrip()[:1] == "{" else None
    if isinstance(inner, (dict, str, list)) and inner and depth:
        return {**fields, **error_fields(inner, depth - 1)}
    return fields


_MESSAGE_FIELDS = "message msg detail error title error_msg errorMessage Message status_msg"


def error_words(value: Any, depth: int = 4) -> str:
    """Message of an error object or of a list of them, such as FastAPI's."""
    if isinstance(value, str) or not depth:
        return value if isinstance(value, str) else ""
    if isinstance(value, list):
        return "; ".join(filter(None, (error_words(item, depth - 1) for item in value[:8])))
    value = as_dict(value)
    location = ".".join(str(step) for step in as_list(value.get("loc"))[:8] if step != "body")
    fields = (value[name] for name in _MESSAGE_FIELDS.split() if value.get(name))
    words = next(filter(None, (error_words(field, depth - 1) for field in fields)), "")
    raw = as_dict(value.get("metadata")).get("raw")  # OpenRouter: the provider's own error
    if isinstance(raw, str) and words == "Provider returned error":
        words += ": " + inner_message(error_words(error_fields(raw), depth - 1))
    return f"{location}: {words}" if location else words


def error_codes(fields: dict[str, Any]) -> str:
    """All codes, types and reasons of an error object, lower-case, in one string."""
    metadata = as_dict(fields.get("metadata"))
    names = [fields.get(name) for name in ("code", "type", "status", "reason")]
    names += [as_dict(item).get("reason") for item in as_list(fields.get("details"))[:8]]  # Google
    names += [metadata.get("error_type"), "moderation" if metadata.get("reasons") else ""]
    return " ".join(str(name)[:200] for name in names if isinstance(name, (str, int))).lower()


def error_status(status: int, fields: dict[str, Any], words: str) -> int:
    """Actual status of an error that came with status 200, or as 5xx from LiteLLM."""
    if status != 200:
        return status >= 500 and litellm_status(words) or status
    for name in ("code", "status", "raw_status_code", "http_code"):
        value = fields.get(name)
        if isinstance(value, (int, str)) and re.fullmatch("[45][0-9]{2}", str(value)):
            return int(value)
    names = fields.get("code"), fields.get("type"), fields.get("status")
    named = named_status(*names) or litellm_status(words)
    worded = (code for code, start in WORDED_STATUS.items() if re.search(start, words, re.I))
    return named or next(worded)


def named_status(*names: Any) -> int | None:
    """Status of the first name that NAMED_STATUS contains; None if it contains none."""
    keys = (re.sub(r"_|error$", "", name.lower()) for name in names if isinstance(name, str))
    return next((NAMED_STATUS[key] for key in keys if key in NAMED_STATUS), None)


def litellm_status(text: str) -> int | None:
    """Status for a LiteLLM message, "litellm.RateLimitError: ..."; None for others."""
    text = text[:4000]
    classes = re.findall(r"litellm\.(?:[a-z_]{1,20}\.){0,3}([A-Z]\w{2,60})", text)
    status = named_status(*classes)
    inner = re.search(r"""["']code["']: ?["']?(4[0-9][0-9])\b""", text)
    return int(inner[1]) if inner and status and status >= 500 else status


_INNER = re.compile(
    r"""["']message["']: ?(?:"((?:[^"\\]|\\.){1,4000})"|'((?:[^'\\]|\\.){1,4000})')""", re.S
)
_WRAPPED = re.compile(
    r"(?:(?:litellm\.)?(?:[a-z_]{1,20}\.){0,3}[A-Z]\w{2,60}: ?|\w{1,60}Exception - "
    r"|Error code: [0-9]{3} - ){1,8}"
)
_DETAILS = re.compile(
    r"\.? ?(?:Received Model Group=|Available Model Group|No fallback model group"
    r"|LiteLLM Retried:|Deployments=|Passed model=|model=\S{1,200} content_policy_fallback"
    r"|Error doing the fallback)"
)


def inner_message(text: str) -> str:
    """Unwrap a message that LiteLLM or the AI SDK has wrapped in its own."""
    text = re.sub(r"^Failed after \d{1,4} attempts[^:]{0,40}: ", "", text[:8000])
    if "litellm." in text or "Exception - " in text:
        for _ in range(3):  # nested, as JSON or as a Python repr()
            inner = _INNER.search(text)
            if not inner:
                break
            text = re.sub(r"\\([\"'\\/])", r"\1", inner[1] or inner[2])
        wrapped = _WRAPPED.match(text)
        text = text[wrapped.end() :] if wrapped else text
        details = _DETAILS.search(text)
        text = text[: details.start()] + "." if details and details.start() > 1 else text
    return text.strip()


_QUOTATION = re.compile(
    r"`[^`\n]{0,200}`|\"[^\"\n]{0,200}\"|(?<!\w)'[^'\n]{0,200}'(?!\w)"
    r"|[\u201c\u00ab][^\u201d\u00bb\n]{0,200}[\u201d\u00bb]"
)


def _without_quotes(text: str, models: Iterable[str]) -> str:
    """Remove what a client may have put into a message: quotations and model names.

    Lower-case, as the words of ErrorRule.
    """
    text = text[:4000]
    for name in filter(None, models):  # a whole word: a model named "i" must not blank all letters
        text = re.sub(rf"(?<!\w){re.escape(name[:MAX_NAME])}(?!\w)", "*", text)
    return _QUOTATION.sub("*", text).replace("\n", " ").lower()


# Patterns of the numbers (#) in errors of requests that are too long; of each name the first one
# that matches is used.
# fmt: off
_OVERFLOW_NUMBERS = [
    (name, pattern.replace("#", "([0-9]{1,12})")) for name, pattern in (
        ("prompt", r"# (?:input tokens|in the messages|of text input|tokens from the input)"),
        ("prompt", r"# `?inputs|prompt (?:\(length|contains|is too long:) #"),
        ("prompt", r"(?:resulted in|n_keep:) #"),
        ("prompt", r"(?:request contains|request|input)(?: length| token count)? \(?#"),
        ("prompt", r"keep the first #|limit: # \+"),
        ("output", r"# (?:output tokens|tokens for the completion|`?max_new)"),
        ("output", r"# in the (?:completion|output)|too large: #|\+ # >"),
        ("limit", r"n_ctx: #|\+ [0-9]{1,12} > #|input length should be \[1, #"),
        ("limit", r"context (?:length|size|window)(?! by)[^0-9.]{0,20}#"),
        ("limit", r"(?:(?:prompt|model) length|token limit|allowed|must be <=)[^0-9.]{0,20}#"),
        ("limit", r"# maximum|> #"),
        ("total", r"requested:? #"),
    )
]
# fmt: on


def parse_overflow(words: str) -> Overflow:
    """Parse the error of a request that is too long for its model, in lower case.

    Knows the messages of OpenAI, Anthropic, Gemini, Mistral, DeepSeek, Moonshot, xAI, OpenRouter,
    vLLM, SGLang, llama.cpp, TGI and LM Studio.
    """
    count: dict[str, int] = defaultdict(int)
    for name, pattern in _OVERFLOW_NUMBERS:
        match = None if count[name] else re.search(pattern, words)
        if match:
            count[name] = int(match[match.lastindex or 0])
    prompt = count["prompt"] or max(0, count["total"] - count["output"])
    return Overflow(prompt, count["output"], count["limit"])


# -- how long to wait

MAX_RETRY_AFTER = 172800.0  # seconds; an absurd value must not disable an upstream for good


def retry_after_seconds(
    headers: dict[str, str],
    body: Any,
    now: Callable[[], float] = time.time,
    message: str = "",
    limit: bool = True,
) -> float | None:
    """Return the seconds to wait (1 to MAX_RETRY_AFTER) by headers, body or message.

    With ``limit`` also by rate-limit headers, which some upstreams send with every response.
    None if no wait is given or it can't be parsed.
    """
    stated = itertools.chain(
        _stated_delays(headers, now, limit),
        _stated_delays(body, now),
        _delays_in_message(message[:4000], now),
    )
    seconds = next((delay for delay in stated if delay is not None), None)
    return None if seconds is None else min(max(1.0, seconds), MAX_RETRY_AFTER)


def seconds_from_now(
    value: Any, now: Callable[[], float] = time.time, unit: float = 1.0
) -> float | None:
    """Seconds until a number, a duration ("1m30.5s"), a Unix time (s or ms) or a date."""
    text = str(value).strip()
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or len(text) > 100:
        return None
    for part in (text, text.partition(",")[0].strip()):  # "30, 30": equal headers joined
        # Only the last number may lack a unit, or the pattern could split digits in 2^n ways.
        if re.fullmatch(r"(?:[0-9]{1,14}(?:\.[0-9]{1,20})?(?:ms|[smhd]|\Z))+", part):
            seconds = total_seconds(part) * unit
            seconds = seconds / 1000 if seconds > 1e11 else seconds  # Unix time in ms
            return seconds - now() if seconds > 1e9 else seconds
        moment = _timestamp(part)
        if moment is not None:
            return moment - now()
    return None


def _timestamp(text: str) -> float | None:
    """Parse an HTTP or ISO 8601 date to a Unix time; None if it is not a valid one."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    iso = re.sub(r"\.([0-9]+)", lambda match: f".{match[1]:0<6.6}", text.replace("Z", "+00:00"))
    for parse, value in ((parsedate_to_datetime, text), (datetime.fromisoformat, iso)):
        with contextlib.suppress(Exception):  # they raise many kinds, depending on the version
            moment = parse(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None


# Headers and fields of error bodies, in lower case without "-" and "_".
_DELAY_FIELD = re.compile(
    r"(?:\w{0,40}retry(?:after|delay|in)|(?:quota)?resets?(?:at|time(?:stamp)?|in|after|delay)"
    r"|(?:wait|cooldown)(?:time)?)(?:ms|s|secs?|seconds)?"
)


def _stated_delays(
    value: Any, now: Callable[[], float], limit: bool = True, depth: int = 5
) -> Iterator[float | None]:
    """Delays in headers, or in an error body with quoted headers; outer ones first."""
    if not depth or not isinstance(value, (dict, list)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    fields = {str(name)[:80].lower(): inner for name, inner in itertools.islice(items, 100)}
    names = ((name, re.sub("[-_]", "", name)) for name in fields)
    delays = [
        seconds_from_now(fields[name], now, 0.001 if plain.endswith("ms") else 1)
        for name, plain in names
        if _DELAY_FIELD.fullmatch(plain)
    ]
    yield min((delay for delay in delays if delay is not None), default=None)
    yield _reset_delay(fields, now) if limit else None
    for inner in fields.values():
        yield from _stated_delays(inner, now, limit, depth - 1)


def _reset_delay(headers: dict[str, Any], now: Callable[[], float]) -> float | None:
    """Longest time until a used-up limit resets, by the rate-limit headers in use."""
    delays: list[float | None] = []
    for name, value in headers.items():
        if name in ("ratelimit", "x-ratelimit"):  # "default";r=0;t=60, or remaining=0, reset=60
            for item in re.split(r', *(?=")', str(value)[:1000]):
                remaining = re.search(r"\b(?:r|remaining)=([0-9]{1,9})\b", item)
                reset = re.search(r"\b(?:t|reset)=([0-9]{1,9})\b", item)
                if reset and (not remaining or remaining[1] == "0"):
                    delays.append(float(reset[1]))
        elif "reset" in name.split("-") and re.search(r"rate-?limit|tokenlimit", name):
            count = str(headers.get(name.replace("reset", "remaining"), "0")).strip()
            if re.fullmatch(r"0(?:\.0{1,9})?|", count):
                delays.append(seconds_from_now(value, now))
    return max((delay for delay in delays if delay is not None), default=None)


_DELAY_IN_MESSAGE = re.compile(
    r"(?:(?:try|retry|again|available)(?:[a-z ]{0,30} |[-_ ])(?:in|after)|wait(?: for| at least)?"
    r"|resets? (?:in|after)):? (?:about |around |approximately |~)?"
    r"((?:[0-9]{1,9}(?:\.[0-9]{1,20})? ?(?:[a-z]{1,12})?(?:,? and |, | )?){1,4})",
    re.I,
)
# With its zone, or it could be hours off.
_DATE_IN_MESSAGE = re.compile(
    r"(?:resets?|until|after|again)(?: at| on)? (20[0-9]{2}-[0-9]{2}-[0-9]{2}[T ][0-9:.]{5,18})"
    r" ?(Z|UTC|[+-][0-9]{2}:[0-9]{2})",
    re.I,
)


def _delays_in_message(text: str, now: Callable[[], float]) -> Iterator[float | None]:
    """Seconds until "resets at 2026-01-02 03:04Z", or in "try again in 7m30s"."""
    date, delay = _DATE_IN_MESSAGE.search(text), _DELAY_IN_MESSAGE.search(text)
    if date:
        yield seconds_from_now(date[1] + date[2].upper().replace("UTC", "Z"), now)
    if delay:
        yield total_seconds(delay[1].lower()) or None


def total_seconds(text: str) -> float:
    """The sum of quantities such as "7m30.5s" or "2 minutes", up to an unknown unit."""
    total = 0.0
    for match in re.finditer(r"([0-9]{1,14}(?:\.[0-9]{1,20})?) ?([a-z]{0,12})", text):
        if match[2] not in SECONDS_PER_UNIT:
            break
        total += float(match[1]) * SECONDS_PER_UNIT[match[2]]
    return total


# fmt: off
SECONDS_PER_UNIT = {
    "": 1.0, "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0,
    "ms": 0.001, "millis": 0.001, "millisecond": 0.001, "milliseconds": 0.001,
    "m": 60.0, "min": 60.0, "mins": 60.0, "minute": 60.0, "minutes": 60.0,
    "h": 3600.0, "hr": 3600.0, "hrs": 3600.0, "hour": 3600.0, "hours": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0,
}
# fmt: on

# -- secrets

# Headers of a controller whose values are not secret.
PUBLIC_HEADERS = (
    "accept accept-language anthropic-beta anthropic-version content-type http-referer"
    " openai-beta origin referer user-agent x-title"
)


def option_secrets(options: ControllerSettings) -> list[str]:
    """Secrets in the headers and the proxy of a controller."""
    secrets = cookie_values(options.cookie)
    for name, value in options.headers.items():
        if name.lower() == "cookie":
            secrets += cookie_values(value)
        elif name.lower() not in PUBLIC_HEADERS.split():
            secrets.append(re.sub(r"^(?:(?:bearer|basic|token) |https?://)", "", value, flags=re.I))
    password = urllib.parse.urlsplit(options.proxy).password or ""
    return [*secrets, *filter(None, (password, urllib.parse.unquote(password)))]


def cookie_values(text: str) -> list[str]:
    """Values of a Cookie header; a part without "=" counts as a value."""
    values = (pair.partition("=")[2] or pair for pair in text.split(";"))
    return [value.strip() for value in values if value.strip()]


_MASKED_KEY = re.compile(r"[\w-]{0,80}\*{3,}[\w*-]{0,80}|\bsk-[\w-]{0,40}\.{3}[\w-]{1,40}")
_MASKED_END = re.compile(
    r"\*{3}(?:\.{2,3}|\u2026|[*xX\u2022]{3,40}|[\[<]\w{1,20}[\]>])[\w+/=-]{1,40}"
)


def redact(text: str, secrets: Iterable[str]) -> str:
    """Replace secrets in an upstream's text by "***".

    Secrets are found in full, in part, encoded, in any case, or masked by the upstream. Those
    shorter than 8 characters are found as separate words only, those shorter than 4 not at all.
    """
    if "***" in text or "..." in text:
        text = _MASKED_KEY.sub("***", text)
    return _MASKED_END.sub("***", _without_secrets(text, secrets))


def redact_bytes(data: bytes, secrets: Iterable[str]) -> bytes:
    """Replace secrets in relayed bytes by "***"; everything else is left unchanged."""
    text = data.decode("utf-8", "surrogateescape")
    return _without_secrets(text, secrets).encode("utf-8", "surrogateescape")


# Characters as URLs, JSON or HTML may write them, also within another string of the same kind.
_ESCAPE = re.compile(
    r"(?:(?:%(?:25){0,2}|\\{1,4}(?:u00|x)|&(?:amp;){0,2}#x0{0,6})([2-7][0-9a-f])"
    r"|&(?:amp;){0,2}#0{0,6}(3[2-9]|[4-9][0-9]|1[01][0-9]|12[0-7])(?![0-9]));?",
    re.I,
)
MAX_UNESCAPED = 1 << 17  # characters; longer strings are not unescaped
MAX_FOUND = 10_000  # secrets; a string with more is replaced


def _without_secrets(text: str, secrets: Iterable[str]) -> str:
    spans = _secret_spans(text, secrets)
    if len(text) <= MAX_UNESCAPED and _ESCAPE.search(text):
        unescaped = _ESCAPE.sub(
            lambda match: chr(int(match[1], 16) if match[1] else int(match[2])), text
        )
        hidden = _secret_spans(unescaped, secrets)
        text, spans = (unescaped, hidden) if len(hidden) > len(spans) else (text, spans)
    if len(spans) == MAX_FOUND:
        return "***"
    parts, done = [], 0
    for start, end in spans:
        if start >= done:
            parts += [text[done:start], "***"]
        done = max(done, end)
    return "".join([*parts, text[done:]])


def _secret_spans(text: str, secrets: Iterable[str]) -> list[tuple[int, int]]:
    """Positions of secrets, in order; MAX_FOUND at most."""
    # All forms are searched in the same text: replacing the beginning of one form could make the
    # remainder of another one too short to be found. Upstreams may change the case of a name.
    folded = _fold(text)
    spans = (span for form in secret_forms(tuple(secrets)) for span in _find_parts(folded, form))
    return sorted(itertools.islice(spans, MAX_FOUND))


def _fold(text: str) -> str:
    """Lower case of the same length; "\u0130".lower() is two characters long."""
    return text.replace("\u0130", "I").lower()


@functools.lru_cache(maxsize=256)
def secret_forms(secrets: tuple[str, ...]) -> list[str]:
    """Secrets in all encodings in which an error may quote them, in lower case."""
    forms = set()
    for secret in secrets:
        data = secret.encode("utf-8", "replace")
        forms |= {secret, to_json(secret)[1:-1].decode(), urllib.parse.quote(secret, safe="")}
        if len(secret) >= 8:
            forms |= {data.hex(), _sha256(secret)}
            for before in range(3):  # bytes in front of it, such as the user of Basic credentials
                encoded = base64.b64encode(bytes(before) + data).decode().rstrip("=")
                encoded = encoded[before + (before > 0) :]
                forms |= {encoded, encoded.translate({43: "-", 47: "_"})}
    return [_fold(form) for form in forms if len(form) >= 4]


def _find_parts(text: str, form: str) -> Iterator[tuple[int, int]]:
    """Positions of a form's beginning, from 8 characters on, and of any 12 in a row."""
    if len(form) < 8:
        for word in re.finditer(rf"(?<!\w){re.escape(form)}(?!\w)", text):
            yield word.span()
    for offset in range(0, len(form) - 7, 4):  # any 12 characters contain one of these blocks
        block = form[offset : offset + 8]
        at = text.find(block)
        while at >= 0:
            before = text[max(0, at - offset) : at][::-1], form[:offset][::-1]
            after = text[at : at + len(form)], form[offset:]
            start = at - common_length(*before)
            end = at + common_length(*after)
            if start == at - offset or end - start >= 12:
                yield start, end
            at = text.find(block, end)


def common_length(first: str, second: str) -> int:
    """Length of the longest common prefix of two strings."""
    differing = (at for at, (one, other) in enumerate(zip(first, second)) if one != other)
    return next(differing, min(len(first), len(second)))


# == 12. akash ================================================================================
# Akash Chat's web API: session, requests, stream, images. Knows no clients and no dialects.


def session_cookie(set_cookie: str) -> tuple[str, float]:
    """Return the session's cookie of Set-Cookie, and its Max-Age; ("", inf) if none."""
    for line in set_cookie.split("\n"):
        match = re.match(r"(session_token=[^;,\s\"\\]+)(.*)", line)
        if match:
            max_age = re.search(r";\s*max-age=([0-9]{1,9})\s*(?:;|$)", match[2], re.I)
            return match[1], float(max_age[1]) if max_age else math.inf
    return "", math.inf


class AkashLogin:
    """A controller's own cookie; a login in it is kept alive. Any thread.

    Auth0's library ends a login a day after GET /api/auth/me/ last renewed its cookie or cookies
    (appSession.0 ...). With a login that has ended, requests succeed, but count as anonymous.
    """

    PATH = "/api/auth/me/"
    INTERVAL, RETRY = 4 * 3600.0, 300.0  # seconds until it is renewed, and after a failure
    ENDED = "its login has ended: set a new cookie"
    COOKIE = re.compile(r"appSession(?:\.[0-9]{1,2})?=[^;,\s\"\\]+")

    def __init__(
        self, transport: Transport, cookie: str, name: str, clock: Callable[[], float]
    ) -> None:
        self.transport, self.name, self.clock = transport, name, clock
        self.set_cookie(cookie)
        has_login = any(map(self.COOKIE.match, cookie.replace(" ", "").split(";")))
        # None without a login; "active" or "ended" once the server has answered
        self.state = "unknown" if has_login else None
        self.renew_at = -math.inf

    def set_cookie(self, cookie: str) -> None:
        """Set the cookie that each request carries."""
        self.cookie = cookie
        if cookie:
            self.transport.headers = {**self.transport.headers, "Cookie": cookie}

    def renew_async(self) -> None:
        """Renew a login in a thread if that is due."""
        now = self.clock()
        if self.state and now >= self.renew_at:
            self.renew_at = now + self.RETRY
            start_thread(self.renew, "akash login")

    def renew(self) -> None:
        """Renew a login, and update its state. Worker thread."""
        try:
            response, _ = self.transport.get_json(self.PATH)
        except APIError as error:
            log.info("%s: login not renewed: %s", self.name, error.message)
            return
        state = {200: "active", 204: "ended", 401: "ended"}.get(response.status)
        if state is None or is_challenge_page(response):
            log.info("%s: login not renewed (status %d)", self.name, response.status)
            return
        if state == "ended" != self.state:
            log.warning("%s: %s", self.name, self.ENDED)
        self.state, self.renew_at = state, self.clock() + self.INTERVAL
        matches = map(self.COOKIE.match, response.headers.get("set-cookie", "").split("\n"))
        renewed = [match[0] for match in matches if match]
        if state == "active" and renewed:
            pairs = (pair.strip() for pair in self.cookie.split(";"))
            others = [pair for pair in pairs if pair and not self.COOKIE.match(pair)]
            self.set_cookie("; ".join([*others, *renewed]))


# fmt: off
# Parameters that Akash Chat can't honour, each with the values that are harmless.
AKASH_UNSUPPORTED: dict[str, list[Any]] = {
    "tools": [[]], "functions": [[]],
    "tool_choice": ["none", "auto"], "function_call": ["none", "auto"],
    "n": [1], "best_of": [1], "logprobs": [False, 0], "top_logprobs": [0],
    "audio": [], "modalities": [["text"]], "suffix": [""],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
}
AKASH_SUPPORTED = {
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "topP",
    "stop", "max_tokens", "max_completion_tokens",
}
# fmt: on

# Special tokens anywhere in a prompt crash the server's tokenizer: akash-chat f0a4ae0 and b58259a
# answer 500 with an empty body. A zero-width U+2060 inside them avoids that.
SPECIAL_TOKENS = re.compile(r"<\|(?=(?:endoftext|fim_prefix|fim_middle|fim_suffix|endofprompt)\|>)")
ESCAPED = "<|\u2060"


def akash_request(model: str, chat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Build the body of POST /api/chat/, and list what it leaves out. APIError 400."""
    body = {name: value for name, value in chat.items() if value is not None}
    for name, value in body.items():
        if value not in AKASH_UNSUPPORTED.get(name, [value]):
            above = " above 1" if name in ("n", "best_of") else ""
            message = f"Akash Chat does not support {name!r}{above}."
            raise bad_request(message, name, "unsupported_parameter")
    known = AKASH_SUPPORTED | AKASH_UNSUPPORTED.keys()
    ignored = [name for name in body if name not in known]
    # Clients that ask for a JSON object also say so in a message: the model does its best.
    if body.get("response_format") == {"type": "json_object"}:
        ignored.append("response_format")
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    files: list[dict[str, str]] = []
    for index, message in enumerate(as_list(body.get("messages"))):
        if message.get("role") in ("system", "developer"):
            system.append(_content(message, f"messages[{index}]", files)[0])
        else:
            messages.append(_akash_message(message, f"messages[{index}]", files))
    if not messages:  # the server would answer 500: many models need a user's turn
        user = {"role": "user", "content": "\n\n".join(system)}
        messages, system = [_akash_message(user, "messages", files)], []
    return {
        "id": new_id()[:16],
        "messages": messages,
        "model": model,
        # akash-chat f0a4ae0: an empty `system` selects the site's own persona, a blank does not
        "system": SPECIAL_TOKENS.sub(ESCAPED, "\n\n".join(filter(None, system))) or " ",
        # 0 and null count as absent. f0a4ae0 then applies the model's default; b58259a fails with
        # "temperature must be a number" if its default comes from a database
        "temperature": number_field(body, "temperature", 0.85) or 1e-6,
        "topP": number_field(body, "topP" if "topP" in body else "top_p", 1.0) or 1e-6,
        "context": files,
    }, ignored


def refused(param: str, words: str) -> APIError:
    """Return the 400 for a part of a request that Akash Chat does not accept."""
    return bad_request(f"{param}: Akash Chat {words}.", param)


def _akash_message(
    message: dict[str, Any], param: str, files: list[dict[str, str]]
) -> dict[str, Any]:
    role = message.get("role")
    if role not in ("user", "assistant"):
        words = f"supports system, developer, user and assistant, not {str(role)[:80]!r}"
        raise refused(f"{param}.role", words)
    if message.get("tool_calls") or message.get("function_call"):
        raise refused(f"{param}.tool_calls", "does not support tool calls")
    text, images = _content(message, param, files)
    escaped = SPECIAL_TOKENS.sub(ESCAPED, text)
    result: dict[str, Any] = {"role": role, "content": escaped}
    if escaped != text:  # akash-chat f0a4ae0: the tokenizer reads `content`, the model `parts`
        result["parts"] = [{"type": "text", "text": text}]
    if images:
        result["experimental_attachments"] = images
    return result


def _content(
    message: dict[str, Any], param: str, files: list[dict[str, str]]
) -> tuple[str, list[dict[str, str]]]:
    """Return a message's text, and its images as attachments; append to ``files``."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise refused(f"{param}.content", "needs a string or a list of parts")
    texts, images = [], []
    for index, part in enumerate(map(as_dict, content)):
        part_param, part_type = f"{param}.content[{index}]", part.get("type")
        value = part.get(str(part_type))
        text = part.get("text", value)
        if part_type in ("text", "refusal", "input_text", "output_text") and isinstance(text, str):
            texts.append(text)
        elif part_type == "image_url":
            url = value.get("url") if isinstance(value, dict) else value
            images.append(_attachment(url, part_param))
        elif part_type == "file" and isinstance(value, dict):
            files.append(_text_file(value, part_param))
        else:
            unsupported = str(part if part_type == "text" else part_type)[:80]
            raise refused(part_param, f"accepts text and images, not {unsupported!r}")
    if images and message.get("role") != "user":
        raise refused(f"{param}.content", "accepts images from the role user only")
    return "".join(texts), images


_IMAGE_URL = re.compile(r"data:(image/[a-z0-9.+-]+);base64,|https?://", re.I)


def _attachment(url: Any, param: str) -> dict[str, str]:
    match = _IMAGE_URL.match(url) if isinstance(url, str) else None
    if not match:
        raise refused(param, "needs an image URL with http(s): or data:image/...;base64,...")
    if match[1]:
        decode_base64(url[match.end() :], param)
    return {"name": "picture", "contentType": (match[1] or "image/png").lower(), "url": url}


def _text_file(file: dict[str, Any], param: str) -> dict[str, str]:
    """Return a file of text as an entry of ``context``; APIError 400 for other files."""
    encoded = file.get("file_data")
    data = decode_base64(encoded.rpartition(",")[2], param) if isinstance(encoded, str) else b"\0"
    text = data.decode("utf-8", "replace")
    if "\0" in text or "\ufffd" in text:
        raise refused(param, "accepts files of UTF-8 text only")
    name = str(file.get("filename") or "file")[:MAX_NAME]
    return {"name": name, "content": SPECIAL_TOKENS.sub(ESCAPED, text)}


def decode_base64(text: str, param: str) -> bytes:
    """Decode base64 like browsers, with blanks, "-_" or no padding. APIError 400."""
    stripped = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        if not stripped:
            raise ValueError("empty")
        padding = "=" * (-len(stripped) % 4)
        return base64.b64decode(stripped + padding, validate=True)
    except ValueError:
        raise bad_request(f"{param}: invalid base64.", param, "invalid_base64") from None


# akash-chat f0a4ae0 drops the oldest messages silently if the conversation has more tokens than its
# model's limit less AKASH_RESERVED; without a limit in the list that is AKASH_CONTEXT.
AKASH_RESERVED, AKASH_CONTEXT = 1000, 128_000
AKASH_SMALL = 500  # tokens of a conversation for which the list is not read

MAX_STOP_LENGTH = 1000  # characters of one stop sequence


def stop_sequences(body: dict[str, Any]) -> list[str]:
    """Return OpenAI's ``stop``, a string or a list of up to four, as a list."""
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad_request("'stop' must be a string or a list of strings.", "stop")
    if len(stops) > 4:
        raise bad_request("'stop' may contain at most four strings.", "stop")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        message = "Invalid 'stop': string too long. Expected strings with maximum length"
        code = "string_above_max_length"
        raise bad_request(f"{message} {MAX_STOP_LENGTH}.", "stop", code)
    return [stop for stop in stops if stop]


# Status and code for an error message by the first pattern it contains. If LiteLLM's exception
# name is in the message, its status takes precedence.
# fmt: off
AKASH_ERRORS: list[tuple[int, str | None, str]] = [
    (404, None,                       r"invalid model name|model \S{1,200} does not exist"),
    (429, None,                       r"rate limit|too many requests|no deployments available"
                                      r"|max parallel request"),
    (400, "content_policy_violation", r"contentpolicyviolation"),
    (400, "context_length_exceeded",  r"maximum context length|contextwindowexceeded|too large"
                                      r"|too long"),
    (400, None,                       r"invalid prompt|unsupported role|invalid argument"
                                      r"|bad request|unprocessable|invalid data content"),
    (401, "upstream_auth",            r"authentication error|api key|unauthorized"),
    (504, None,                       r"timed? ?out|timeout"),
    (503, None,                       r"service unavailable|overloaded"),
    (502, None,                       r""),
]
# fmt: on


def akash_error(text: str, model: str, secrets: Iterable[str] = ()) -> APIError:
    """Return the APIError for the message of Akash Chat's backend, usually LiteLLM."""
    text = text[:4000]
    named_status = litellm_status(text)
    status, code = next(
        (status, code) for status, code, pattern in AKASH_ERRORS if re.search(pattern, text, re.I)
    )
    if named_status and status not in (404, named_status):
        status, code = named_status, None
    if status == 404 and model not in ("", AkashController.IMAGE_MODEL):
        return akash_model_not_found(model)
    if status == 404:  # akash-chat f0a4ae0 reports any failure of AkashGen in this way
        error = image_failed("Akash Chat could not generate the image, or does not offer AkashGen.")
        error.legacy_message = "Error Model."
        return error
    reason, message = first_line(text, secrets), "Akash Chat failed without giving a reason."
    if reason not in ("", "[object Object]", "An error occurred."):  # the AI SDK's placeholders
        message = f"Akash Chat: {reason}"
    if status in (401, 402, 403):  # a key of the backend: concerns the model, not our session
        error = auth_error(message, status)
        error.category, error.cooldown_scope = Category.REFUSED, "model"
        error.upstream_status = None
        return error
    wait = retry_after_seconds({}, {}, message=text)
    error = APIError({500: 502, 529: 503}.get(status, status), message, code=code)
    if status == 429 or status >= 500 and wait is not None:
        error.category, error.cooldown_scope, error.retry_after = Category.RATE_LIMIT, "model", wait
    return error


def first_line(message: str, secrets: Iterable[str]) -> str:
    """Return the first line of a message without its wrapping, secrets and addresses."""
    line = redact(inner_message(message).split("\n")[0], secrets)
    return _ADDRESS.sub("(address)", line[:1000])[:300]  # the first limit bounds the pattern's time


def image_failed(message: str, status: int = 502, retry: bool = False) -> APIError:
    """Return the error for an image that was not generated; chats go on meanwhile."""
    return APIError(status, message, code="image_failed", retry=retry, cooldown_scope="model")


def no_image(words: str) -> APIError:
    """Return the 400 for words where an image was requested."""
    message = "Akash Chat answered with text instead of an image"
    message += f": {words[:500]}" if words else ", and did not pass it on."
    return bad_request(message, "prompt", "no_image")


# fmt: off
_ADDRESS = re.compile(  # errors may name an upstream's internal hosts
    r"(?:(?<![a-z])[a-z]+://[^\s'\"]+"                        # URL
    r"|\b\d{1,3}(?:\.\d{1,3}){3}"                             # IPv4
    r"|(?<![0-9a-z:])\[?[0-9a-f:]*::[0-9a-f:.]*\]?"           # IPv6 with "::"
    r"|(?<![a-z0-9.-])[a-z0-9-]+(?:\.[a-z0-9-]+)+(?=:\d)"     # host.domain:port
    r"|(?<![a-z0-9-])[a-z0-9-]+(?=:\d{2,5}\b)"                # host:port
    r")(?::\d{1,5})?",
    re.I,
)
# fmt: on

_PLAIN_TEXTS = re.compile(rb'(?:0:"[ !#-\[\]-~]+"\n)+')  # ASCII without escapes
_NO_TEXT_PART = re.compile(rb"\n(?!0:)([^\n]*)")  # splits text parts in a row from other lines


class AkashDecoder(Decoder):
    r"""Decoder of Akash Chat's stream in either framing; each line shows which.

    AI SDK 4, ``CODE:JSON``:                     AI SDK 5 to 7, server-sent events:

        f:{"messageId":"msg-1"}                      data: {"type":"start"}
        0:"Hello"            Text                    data: {"type":"text-delta","delta":"Hello"}
        g:"Let me"           Reasoning               data: {"type":"reasoning-delta","delta":...}
        9:{"toolName":...}   ToolCall                data: {"type":"tool-input-available",...}
        3:"terminated"       error                   data: {"type":"error","errorText":"..."}
        e:{...}              skipped                 data: {"type":"finish-step"}
        d:{"finishReason":"stop",                    data: {"type":"finish","finishReason":"stop"}
           "usage":{...}}    Finish                  data: [DONE]

    Other codes and types are skipped. Consecutive text parts of one read become one event. An
    answer without Finish is an error, as is a finish reason "error", "unknown" or "other": AI SDK
    4 reports "unknown" if the backend ended without a finish reason, so the answer may be cut.

    Lines are split at the byte "\n" only, since U+2028, U+2029 and U+0085 appear unescaped in
    strings. akash-chat b58259a (May 2026) sends reasoning as one part,
    ``<think>\n...\n</think>\n\n``. It becomes Reasoning here, where the part's bounds are known,
    since the reasoning itself may contain these tags.
    """

    LINE_LIMIT = 8 << 20  # bytes
    has_fast_path = True
    REASONING_PART = "<think>\n", "\n</think>\n\n"
    FINISH_REASONS = ("stop", "length", "content-filter", "tool-calls")  # OpenAI's have "_"
    # types of SDK 5 for the codes of SDK 4
    TYPES = {b"g": "reasoning-delta", b"9": "tool-input-available", b"3": "error", b"d": "finish"}

    def __init__(self, model: str = "", secrets: Iterable[str] = ()) -> None:
        self.model, self.secrets = model, secrets
        # Of the instance: a token reads them, and an attribute of the class takes longer.
        self.complete, self.error = False, None
        self.buffer = bytearray()  # an incomplete line
        self.tool_count = 0

    def feed(self, data: bytes) -> list[Event]:
        texts = self.fast_path(data) if data.endswith(b'"\n') else b""
        if texts:
            return [Text(texts[1:-1].decode())]
        out: list[Event] = []
        for part in _NO_TEXT_PART.split(b"\n" + take_complete_lines(self.buffer, data)):
            if self.complete or self.error:
                break
            if part.startswith(b"\n0:"):
                self._texts(part[3:].split(b"\n0:"), out)
            elif part:
                self._line(part, out)
        if self.complete or self.error:
            self.buffer.clear()
        elif len(self.buffer) > self.LINE_LIMIT:
            self._fail("Akash Chat sent a line that is too long.")
        return out

    def fast_path(self, data: bytes) -> bytes:
        """Return the JSON string of data that is plain text parts only, else b""."""
        if self.buffer or self.complete or self.error or not _PLAIN_TEXTS.fullmatch(data):
            return b""
        return data[2:-1].replace(b'"\n0:"', b"")

    def close(self) -> list[Event]:
        """Handle the end of the response body; an error unless Finish was received."""
        out = self.feed(b"\n") if self.buffer.strip() else []  # the last "\n" may be missing
        if self.error and self.error.message == MALFORMED_LINE:
            self.error = None  # the line was cut: report the truncation below instead
        if not self.complete:
            self._fail(ENDED_EARLY)
        return out

    def _line(self, line: bytes, out: list[Event]) -> None:
        code, data = line[:1], line[5:].strip()
        try:
            if line[1:2] == b":" and code.isalnum():
                if code in self.TYPES:
                    value = _decode_any(line[2:].decode("utf-8", "surrogatepass"))
                    event = {"delta": value, "errorText": value, **as_dict(value)}
                    self._event({**event, "type": self.TYPES[code]}, out)
            elif line.startswith(b"data:"):
                if data == b"[DONE]":
                    self._fail(ENDED_EARLY)
                else:
                    event = as_dict(_decode_any(data.decode("utf-8", "surrogatepass")))
                    self._event({"finishReason": "stop", **event}, out)
            elif re.match(rb"\s*<(!doctype|html|head|body)\b", line, re.I):
                self._fail(CHALLENGE_PAGE, "upstream_blocked")
            elif not line.startswith((b":", b"event:", b"id:", b"retry:", b"\r")):
                self._fail("Akash Chat sent something other than a stream.")
        except (ValueError, RecursionError):
            self._fail(MALFORMED_LINE)

    def _event(self, event: dict[str, Any], out: list[Event]) -> None:
        event_type, delta = event.get("type"), event.get("delta")
        if event_type in ("text-delta", "reasoning-delta"):
            if isinstance(delta, str) and delta:
                out.append(Text(delta) if event_type == "text-delta" else Reasoning(delta))
        elif event_type == "tool-input-available":
            self._tool(event, out)
        elif event_type in ("error", "tool-input-error"):
            self.error = akash_error(str(event.get("errorText", "")), self.model, self.secrets)
        elif event_type == "finish":
            self._finish(event, out)

    def _texts(self, lines: list[bytes], out: list[Event]) -> None:
        """Decode consecutive text parts at once; one by one if any of them is malformed.

        Joined by ",\\n" no part can swallow the next: JSON strings contain no raw line break.
        """
        try:
            joined = b"[%b]" % b",\n".join(lines)
            texts = _decode_any(joined.decode("utf-8", "surrogatepass"))
            text = "".join(texts)
            if len(texts) != len(lines):
                raise ValueError("a line holds more than one value")
        except (ValueError, TypeError, RecursionError):
            if len(lines) == 1:
                self._fail(MALFORMED_LINE)
                return
            for line in lines:
                if not self.error:
                    self._texts([line], out)
            return
        if "<think>\n" not in text:
            texts = [text]
        opening, closing = self.REASONING_PART
        for text in filter(None, texts):
            if text.startswith(opening) and text.endswith(closing):
                out.append(Reasoning(text[len(opening) : -len(closing)]))
            else:
                out.append(Text(text))

    def _tool(self, event: dict[str, Any], out: list[Event]) -> None:
        if self.tool_count == MAX_TOOL_CALLS:
            self.error = too_many_calls("Akash Chat")
            return
        arguments = _encode(event.get("input", event.get("args")))
        call_id, name = str(event.get("toolCallId")), str(event.get("toolName"))
        out.append(ToolCall(self.tool_count, arguments, call_id, name))
        self.tool_count += 1

    def _finish(self, event: dict[str, Any], out: list[Event]) -> None:
        reason, metadata = event.get("finishReason"), as_dict(event.get("messageMetadata"))
        usage = metadata.get("totalUsage") or metadata.get("usage") or event.get("usage")
        if reason in self.FINISH_REASONS:
            self.complete = True
            out.append(Finish(reason.replace("-", "_"), chat_usage(usage)))
        elif reason == "error":
            self._fail("Akash Chat failed in the middle of its answer.")
        else:
            self._fail("Akash Chat: connection lost: it ended its answer without a finish reason.")

    def _fail(self, message: str, code: str = "upstream_error") -> None:
        self.error = self.error or APIError(502, message, code=code, category=Category.CUT)


def akash_decoder(model: str, secrets: Iterable[str], *filters: Filter) -> DecoderChain:
    """Return the decoder of an answer of Akash Chat, with the filters that each needs."""
    decoder = AkashDecoder(model, secrets)
    return DecoderChain(decoder, SurrogateFilter(), ThinkTagFilter(), *filters)


def is_challenge_page(response: UpstreamResponse) -> bool:
    """Whether a proxy before the server wants a browser, as a CDN's challenge does."""
    # Pages with 429 or a 5xx only say that the server is overloaded or down.
    is_page = response.headers.get("content-type", "").startswith("text/html")
    return "cf-mitigated" in response.headers or (
        is_page and response.status != 429 and response.status < 500
    )


def challenge_page_error(response: UpstreamResponse) -> APIError:
    """Return the 502 for a challenge page, without any of its HTML; also log it."""
    name = urllib.parse.urlsplit("//" + response.request.fields["Host"]).hostname
    reason = f"{name}: {CHALLENGE_PAGE}"
    message = f"{reason} (status {response.status})"
    log.warning("%s", message)
    error = APIError(502, message, code="upstream_blocked", category=Category.CUT, reason=reason)
    error.upstream_status = response.status
    return error


ENDED_EARLY = "Akash Chat: connection lost: it ended its answer early."
MALFORMED_LINE = "Akash Chat sent a malformed line."
CHALLENGE_PAGE = (
    "A proxy in front of Akash Chat answered with a web page: set AKASH_COOKIE and USER_AGENT as"
    " in a browser that gets past it, or set PROXY."
)


# AkashGen's answer. akash-chat (f0a4ae0, b58259a) builds the line by string concatenation and
# escapes only "'" in the prompts, so quotes, newlines and backslashes make it invalid JSON.
IMAGE_JOB = re.compile(
    r"<image_generation> jobId='([^'\n]*)' prompt='(.*)'</image_generation>", re.S
)


def parse_image_job(body: bytes) -> tuple[str, str] | None:
    """Return (job ID, prompt) from AkashGen's answer; None if it is anything else."""
    text = body.decode("utf-8", "replace")
    start = text.find('0:"<image_generation>')
    if start >= 0:
        text = text[start + 3 :]
    else:
        text = fold(SurrogateFilter().feed(AkashDecoder().feed(body))).text.strip()
    # to the last end mark: the prompt itself may contain one
    match = IMAGE_JOB.match(text)
    if not match:
        return None
    prompt = re.split(r"(?<!\\)' negative='", match[2])[0]
    return match[1], prompt.replace("\\'", "'")


@dataclass(eq=False)
class ImageBatch:
    """The image jobs of one request."""

    key: tuple[str, str, str]  # of the request: its client, path and body
    cancellation: Cancellation | None = None  # of the request, until it has ended
    expires_at: float = math.inf
    jobs: list[tuple[str, str]] = field(default_factory=list)  # (job ID, prompt)
    lock: Any = field(default_factory=threading.Lock)  # held while a job is being started


class AkashImages:
    """Generates images: starts and polls jobs, fetches results. Worker thread.

    SDKs repeat a request after a timeout or an error 5xx, while its jobs go on at Akash Chat. A
    repeat has the client, path and body of a request that ended without its images, and joins its
    jobs. Jobs whose images were sent are forgotten: the same prompt then gives other images.
    """

    MAX_BATCHES, KEPT_SECONDS = 1000, 600.0

    def __init__(self, akash: AkashController, clock: Callable[[], float]) -> None:
        self.akash, self.clock, self.lock = akash, clock, threading.RLock()
        self.batches: deque[ImageBatch] = deque(maxlen=self.MAX_BATCHES)

    def find(self, call: Call) -> ImageBatch:
        """Return the batch that the call repeats, or a new one."""
        key = call.client, call.original.path, _sha256(call.original.raw_body)
        with self.lock:
            now = self.clock()
            for batch in self.batches:
                has_ended = batch.cancellation is None or batch.cancellation.reason  # or soon will
                if batch.key == key and has_ended and now < batch.expires_at:
                    return batch
            return ImageBatch(key)

    def join(self, call: Call) -> ImageBatch:
        """Make the batch that the call repeats, or a new one, the call's own."""
        with self.lock:
            batch = self.find(call)
            batch.cancellation = call.cancellation
            batch.expires_at = self.clock() + self.KEPT_SECONDS
            if batch not in self.batches:
                self.batches.append(batch)
        return batch

    def events(self, call: Call, data: bytes) -> Iterator[Event]:
        """Start a job for each image, then poll them; text instead of a job is passed on."""
        batch, may_be_repeated = self.join(call), False
        try:
            yield from self._batch_events(call, data, batch)
        except APIError as error:  # those that SDKs retry
            may_be_repeated = error.status >= 500 and error.retry is not False
            raise
        except (ClientDisconnected, GeneratorExit):
            may_be_repeated = call.cancellation.reason is not None
            raise
        finally:
            with self.lock:
                if batch in self.batches and not may_be_repeated:
                    self.batches.remove(batch)
                elif batch.cancellation is call.cancellation:  # no repeat has joined it yet
                    batch.cancellation = None  # whose reason would keep the request in memory

    def _batch_events(self, call: Call, data: bytes, batch: ImageBatch) -> Iterator[Event]:
        """Yield a batch's events; one job at a time if concurrent requests are limited."""
        sequential = call.one_image_at_a_time or self.akash.options.max_concurrency > 0
        count = call.image_count or 1
        for index in range(count):
            # a job can't be cancelled: start none for a client that left
            call.cancellation.raise_if_cancelled()
            text = self._start_job(call, data, batch, index)
            if text is not None:
                yield from text
                return
            if sequential:
                yield from self._poll_image(call, *batch.jobs[index])
        for job in () if sequential else batch.jobs[:count]:
            yield from self._poll_image(call, *job)
        yield Finish("stop")

    def _start_job(
        self, call: Call, data: bytes, batch: ImageBatch, index: int
    ) -> list[Event] | None:
        """Start a job of a batch, unless it has one; events if the answer is text."""
        while not batch.lock.acquire(timeout=0.25):  # the predecessor is just starting it
            call.cancellation.raise_if_cancelled()
        try:
            if index < len(batch.jobs):
                return None
            # A repeat could not join a job whose ID was lost with the connection.
            with call.cancellation.shield():
                response, body = self.akash.with_session(
                    "POST", self.akash.CHAT_PATH, call.scope, self.akash.IMAGE_MODEL, data=data
                )
                job = parse_image_job(body)
                if job is None:
                    return self._text_instead(call, response, body)
                if job[0] in ("", "undefined"):
                    raise image_failed("Akash Chat could not start the image job.")
                batch.jobs.append(job)
            return None
        finally:
            batch.lock.release()

    def _text_instead(self, call: Call, response: UpstreamResponse, body: bytes) -> list[Event]:
        """Return the events of an answer with text where an image was requested."""
        decoder = akash_decoder(self.akash.IMAGE_MODEL, self.akash.secrets())
        events = decoder.feed(body) + decoder.close()
        if decoder.error:
            # akash-chat b58259a, which sends this header, passes text to a backend model AkashGen
            # that is usually missing, and reports failures by status; f0a4ae0 fails in this way.
            is_b58259a = "cross-origin-resource-policy" in response.headers
            is_text = decoder.error.code == "image_failed" and is_b58259a
            raise no_image("") if is_text else decoder.error
        if call.image_count:
            raise no_image(fold(events).text)
        return events

    def _poll_image(self, call: Call, job: str, prompt: str) -> Iterator[Event]:
        """Poll a job, ever more slowly, until its image is ready; APIError if it fails."""
        interval, misses, last_progress = self.akash.settings.image_poll, 0, None
        deadline = time.monotonic() + self.akash.settings.image_timeout
        while True:
            call.cancellation.sleep(interval)
            interval = min(interval * 1.5, self.akash.settings.image_poll * 6)
            state = self._job_state(call, job)
            fields = state or {}
            status, result = str(fields.get("status") or ""), str(fields.get("result") or "")
            if status == "failed" or result.startswith("Failed"):
                reason = first_line(result, self.akash.secrets()) or "no reason given"
                raise image_failed(f"Image generation failed: {reason}.")
            if status in ("succeeded", "completed"):
                yield self._fetch_image(call, job, prompt, result)
                return
            # akash-chat's web page gives up when a job is unknown three times in a row; a failed
            # status request counts for a quarter of that
            misses = 0 if status else misses + (1 if state is None else 4)
            if misses >= 12:
                raise image_failed("Akash Chat lost the image job.")
            if time.monotonic() > deadline:
                limit = f"{self.akash.settings.image_timeout:g} seconds"
                raise image_failed(f"The image was not ready within {limit}.", 504, retry=True)
            progress = ImageProgress(status, count_or_none(fields.get("queue_position")) or 0)
            if status and progress != last_progress:
                last_progress = progress
                yield progress

    def _job_state(self, call: Call, job: str) -> dict[str, Any] | None:
        """Return a job's status object; {} if it is unknown, None if the request failed."""
        path = "/api/image-status/?ids=" + urllib.parse.quote(job, safe="")
        try:
            response, jobs = self.akash.transport.get_json(path, call.scope)
        except APIError as error:
            log.info("status of an image job: %s", error.message)
            call.cancellation.new_scope()  # a timeout has cancelled the old one
            return None
        if response.status >= 500:
            return None
        return as_dict(next(iter(as_list(jobs)), None)) if response.status == 200 else {}

    def _fetch_image(self, call: Call, job: str, prompt: str, result: str) -> Image:
        name = result.rsplit("/", 1)[-1]
        if not IMAGE_NAME.fullmatch(name):
            raise image_failed("Akash Chat returned an invalid image name.")
        data = self.akash.image(name, call.scope).read() if call.images_as_bytes else None
        return Image(job, prompt, name, f"{self.akash.options.base_url}/api/image/{name}", data)


class AkashController(Controller):
    """Akash Chat's web API: streams chats, generates images with the model AkashGen."""

    IMAGE_MODEL = "AkashGen"
    SESSION_PATH = "/api/auth/session/"
    CHAT_PATH = "/api/chat/"
    LIMIT_PATH = "/api/rate-limit/status/"  # since akash-chat b58259a
    # akash-chat b58259a (May 2026) cuts a body above this size, then answers an empty 500
    MAX_BODY_BYTES = 10_000_000

    transport: Transport

    def __init__(
        self,
        options: ControllerSettings,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(options, settings)
        headers = {"Accept": "*/*", **options.headers}
        self.transport = Transport(options, settings, options.base_url, "Akash Chat", headers)
        cookies = options.cookie, self.transport.headers.get("Cookie", "")
        self.login = AkashLogin(self.transport, "; ".join(filter(None, cookies)), self.name, clock)
        # akash-chat f0a4ae0 (July 2025) expects the SHA-256 of the access token, b58259a (May
        # 2026) the token itself. The form that worked last is tried first.
        token = options.api_key
        self.access_tokens = [token, _sha256(token)] if token else [""]
        own_secrets = cookie_values(settings.akash_cookie) + option_secrets(options)
        self.own_secrets = [*self.access_tokens, *own_secrets]
        self.images = AkashImages(self, clock)
        self.session = Cache(f"{self.name}: session", self._start_session, clock, expires=True)
        self.model_cache = Cache(f"{self.name}: models", self._fetch_models, clock)
        self.context_lengths: dict[str, int] = {}  # in tokens, by model

    def check_support(self, call: Call) -> APIError | None:
        try:
            call.prepared_requests[self.name] = self._prepare(call)
        except APIError as error:
            return error
        if self._is_image(call) and self.images.find(call) in self.images.batches:
            call.preferred = self.name
        return None

    def _is_image(self, call: Call) -> bool:
        names = call.model, self.upstream_model(call.model)
        return call.image_count > 0 or self.IMAGE_MODEL in names

    def events(self, call: Call) -> Iterable[Event]:
        body, stop_filter, call.attempt.ignored_params = call.prepared_requests[self.name]
        # Only now: a pool may have many such controllers, each with all of a large body.
        data = request_json(body, len(call.original.raw_body))
        if self._is_image(call):
            return self.images.events(call, bytes(data))
        self._check_context(call, body)
        cookie = self.session.get(call.scope)
        options = {"data": data, "retry_reason": call.attempt.retry_reason}
        response = self._send("POST", self.CHAT_PATH, call.scope, cookie, **options)
        return EventStream(response, functools.partial(self._decoder, call, stop_filter, cookie))

    def _check_context(self, call: Call, body: dict[str, Any]) -> None:
        """Note or, with APIError 400, refuse a conversation that Akash Chat would cut."""
        messages = [*body["messages"], *body["context"]]
        texts = [body["system"], *(message["content"] for message in messages)]
        tokens = tokens_of(sum(map(token_units, texts)))
        if tokens > AKASH_SMALL:
            with contextlib.suppress(APIError):
                self.models()
        limit = self.context_lengths.get(self.upstream_model(call.model), AKASH_CONTEXT)
        room = max(0, limit - AKASH_RESERVED)
        if tokens <= room:
            return
        if (self.options.context_overflow or self.settings.context_overflow) == "refuse":
            message = f"This model's maximum context length is {limit} tokens, of which Akash Chat"
            message += f" keeps {AKASH_RESERVED}; your messages have about {tokens} tokens."
            error = bad_request(message, "messages", "context_length_exceeded")
            error.category, error.overflow = Category.REFUSED, Overflow(tokens, 0, room)
            raise error
        call.attempt.overflow = f"about {tokens} tokens > {room}"

    def _prepare(self, call: Call) -> tuple[dict[str, Any], StopFilter, list[str]]:
        """Return the request body, the filter of its answer, and what is ignored of it."""
        if call.relay_only:
            message = f"Akash Chat does not offer {call.original.path[:200]!r}."
            raise APIError(404, message, code="not_found")
        if call.translation_error:
            raise call.translation_error
        name = self.upstream_model(call.model) or self.IMAGE_MODEL
        if call.image_count and self.IMAGE_MODEL not in (call.model, name):
            raise bad_request(f"Images are generated by the model {self.IMAGE_MODEL}.", "model")
        fields, dropped = adapt_body(call.body, self.options, is_chat=not call.image_count)
        body, ignored = akash_request(name, fields)
        limits = ("max_completion_tokens", "max_tokens")
        limit = next((name for name in limits if fields.get(name) is not None), "")
        max_tokens = number_field(fields, limit, None, integer=True, minimum=1)
        stop_filter = StopFilter(stop_sequences(fields), max_tokens)
        return body, stop_filter, [*dropped, *ignored]

    def secrets(self, cookie: str | None = None) -> list[str]:
        """List the strings to redact from errors: keys, header values and cookies."""
        cookies = "; ".join(filter(None, (self.login.cookie, self.session.value, cookie)))
        return self.own_secrets + cookie_values(cookies)

    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {"akashproxy_session_renewals_total": self.session.fetch_count}
        if self.login.state in ("active", "ended"):
            metrics["akashproxy_login_active"] = int(self.login.state == "active")
        return metrics

    def status(self) -> dict[str, Any]:
        return {"login": self.login.state}

    def limit_is_over(self) -> bool | None:
        response, status = self.transport.get_json(self.LIMIT_PATH)
        blocked = as_dict(status).get("blocked")
        return not blocked if response.status == 200 and isinstance(blocked, bool) else None

    def login_problem(self) -> str:
        if self.login.state:
            self.login.renew()
        return self.login.ENDED if self.login.state == "ended" else ""

    def take_over(self, previous: Any) -> None:
        self.login.set_cookie(previous.login.cookie)
        self.login.state, self.login.renew_at = previous.login.state, previous.login.renew_at
        self.images, previous.images.akash = previous.images, self

    def on_tick(self, now: float) -> None:
        super().on_tick(now)
        self.login.renew_async()

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        # akash-chat f0a4ae0: names without an extension need the slash, others must not have it
        path = f"/api/image/{name}" if "." in name else f"/api/image/{name}/"
        response = self.transport.fetch("GET", path, scope)
        if response.status == 200 and response.headers.get("content-type", "").startswith("image/"):
            return response
        response.close()
        if response.status in (200, 404):
            raise APIError(404, f"The image {name!r} does not exist.", code="not_found")
        message = f"Akash Chat could not serve the image (status {response.status})."
        raise APIError(502, message, upstream_status=response.status)

    def _send(
        self, method: str, path: str, scope: CancelScope, cookie: str, **options: Any
    ) -> UpstreamResponse:
        """Start a request with the session's cookie."""
        headers = {"Content-Type": "application/json"} if options.get("data") else {}
        if cookie:
            headers["Cookie"] = "; ".join(filter(None, (cookie, self.login.cookie)))
        return self.transport.start_request(method, path, scope, headers=headers, **options)

    def _decoder(
        self, call: Call, stop_filter: StopFilter, cookie: str, response: UpstreamResponse
    ) -> Decoder:
        """Return the decoder for the body of a stream or of an error."""
        if response.status == 200 and not is_challenge_page(response):
            filters = [stop_filter] if stop_filter.needed else []
            return akash_decoder(call.model, self.secrets(cookie), *filters)
        fail = functools.partial(self._fail, response, call.model, cookie)
        return BufferedBody(fail, MAX_SHORT_BODY, is_error_body=True)

    def with_session(
        self, method: str, path: str, scope: CancelScope, model: str = "", **options: Any
    ) -> tuple[UpstreamResponse, bytes]:
        """Send a request in a session; return the response, of status 200, and its body."""

        def send(retry_reason: str) -> tuple[UpstreamResponse, bytes]:
            cookie = self.session.get(scope)
            response = self._send(method, path, scope, cookie, retry_reason=retry_reason, **options)
            response.read_head()
            body = response.read(limit=MAX_SHORT_BODY)
            if response.status != 200 or is_challenge_page(response):
                self._fail(response, model, cookie, body)
            return response, body

        return retrying(send)

    def _start_session(self) -> tuple[str, float]:
        """Return a new session's cookie, or "", and its lifetime in seconds. APIError.

        A cookie is valid for its Max-Age, counted from before the request was sent. Servers without
        sessions set no cookie, or (akash-chat b58259a, May 2026, without Redis) the fixed
        ``session_token=validated``; both are valid. The request itself carries no session cookie:
        b58259a answers a valid one without setting or extending anything.
        """
        for token in list(self.access_tokens):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            response, answer = self.transport.get_json(self.SESSION_PATH, headers=headers)
            if is_challenge_page(response):
                raise challenge_page_error(response)
            if response.status == 200:
                self.access_tokens.sort(key=lambda other: other != token)
                return session_cookie(response.headers.get("set-cookie", ""))
            if response.status != 403:
                break
        reason = redact(str(as_dict(answer).get("error", ""))[:4000], self.secrets())[:200]
        if "ccess token" in reason:
            message = (
                f"Akash Chat requires a valid access token ({reason}): set AKASH_ACCESS_TOKEN."
            )
            raise auth_error(message, response.status)
        moved = redact(response.headers.get("location", "")[:1000], self.secrets())[:200]
        hint = f": it redirects to {moved}, check AKASH_BASE_URL" if moved else ""
        message = f"Akash Chat did not start a session (status {response.status}){hint}."
        wait = retry_after_seconds(response.headers, answer)
        raise no_session(message, response.status, wait)

    def _fail(self, response: UpstreamResponse, model: str, cookie: str, body: bytes) -> NoReturn:
        """Raise the error for an unsuccessful response; invalidate a rejected session."""
        request = response.request
        status, fields = response.status, as_dict(json_or_none(body))
        message = str(fields.get("message") or fields.get("error") or "")
        if status == 403 and message == "Unauthorized: Invalid session":
            self.session.invalidate(cookie)
            if request.retry_reason != "session":
                message = "Akash Chat rejected the session."
                raise APIError(502, message, code="session", category=Category.RETRY)
            raise no_session("Akash Chat rejected a new session.", status)  # its store is down
        if status == 400 and not fields and body:
            message = "Bad request: " + body[:4000].decode("utf-8", "replace")
        text, secrets = message[:4000], self.secrets(cookie)
        reason = first_line(text, secrets)
        wait = retry_after_seconds(response.headers, fields, message=text, limit=status == 429)
        is_large = len(request.body or b"") > self.MAX_BODY_BYTES
        if status == 413 or status == 500 and not text and is_large:
            message = "The request is too large for Akash Chat (limit: 10 MB)."
            error = APIError(413, message, category=Category.REFUSED, retry=False)
        elif is_challenge_page(response):
            error = challenge_page_error(response)
        elif fields.get("error") == "Model not available":
            is_outage = fields.get("available_models") == []  # b58259a
            error = no_models() if is_outage else akash_model_not_found(model)
        elif fields.get("error") == "Error generating image":  # b58259a
            error = image_failed(f"Image generation failed: {reason}")
        elif status == 429:
            message = f"Akash Chat: {reason or 'too many requests.'}"
            error = APIError(429, message, retry_after=wait)
        elif status in (401, 403):
            error = auth_error(f"Akash Chat denied access ({reason or status}).", status)
        else:
            message = f"Akash Chat failed without giving a reason (status {status})."
            unknown = APIError(502 if status <= 500 else 503, message)
            error = akash_error(text, model, secrets) if text else unknown
            if error.status == 400 != status:
                error = APIError(502, error.message)
            if wait and error.category is Category.SERVER:
                error.category, error.retry_after = Category.RATE_LIMIT, wait
        error.upstream_status = status
        raise error

    def _fetch_models(self) -> tuple[list[dict[str, Any]], float]:
        _, body = self.with_session("GET", "/api/models/", CancelScope(), short=True)
        entries = akash_models(json_or_none(body))
        if not entries:
            raise no_models()
        common = {"object": "model", "created": 1626777600, "owned_by": "Akash Network"}
        common["permission"] = None
        models = [
            with_context_length({"id": name, **common, "root": name, "parent": None}, entry)
            for name, entry in entries.items()
        ]
        lengths = {model["id"]: model.get(CONTEXT_FIELDS[0], AKASH_CONTEXT) for model in models}
        self.context_lengths = lengths
        return models, self.settings.models_ttl


def no_session(message: str, status: int, wait: float | None = None) -> APIError:
    """Return the 503 for a server without sessions, after ``wait`` seconds if named."""
    category = Category.RATE_LIMIT if wait else Category.NETWORK
    error = APIError(
        503, message, code="upstream_session", retry_after=wait or 5, category=category
    )
    error.upstream_status = status
    return error


def no_models() -> APIError:
    """Return the error for an empty list: an outage of the backend, not a wrong model."""
    message = "Akash Chat lists no models at the moment."
    return APIError(503, message, retry_after=30, category=Category.NETWORK, upstream_status=200)


def akash_models(listing: Any) -> dict[str, dict[str, Any]]:
    """Return the models in any akash-chat version's list, by ID.

    Lists are arrays, or objects with ``models``; others count as empty. Where b58259a has a
    database, an entry's ``id`` may be the database's key and ``model_id`` the model.
    """
    if isinstance(listing, dict):
        listing = listing.get("models") or listing.get("data")
    entries = [entry for entry in map(as_dict, as_list(listing)) if entry.get("available", True)]
    named = ((entry.get("model_id") or entry.get("id"), entry) for entry in entries)
    return bounded_model_list("Akash Chat", named)


# == 13. openai ===============================================================================
# OpenAI-compatible upstreams, decoded or relayed, and echo. Knows no clients and no dialects.


class ChatDecoder(Decoder):
    """Decoder of chat completions of OpenAI-compatible upstreams, streamed or not.

        : keep-alive                                            skipped; also event:, id:, retry:
        data: {"choices":[{"delta":{"content":"Hi"}}]}          Text
        data: {"choices":[{"delta":{"reasoning_content":"h"}}]} Reasoning; also "reasoning"
        data: {"choices":[{"delta":{"tool_calls":[...]}}]}      ToolCall fragments
        data: {"choices":[{"delta":{},"finish_reason":"stop"}]} kept for Finish
        data: {"choices":[],"usage":{...}}                      kept for Finish
        data: {"error":{"message":"..."}}                       error
        data: [DONE]                                            Finish; optional

    Events without data, whose data is JSON but no object, and without JSON of a type that is not
    "message" (a ping) or after a finish_reason are skipped. Only choice 0 is decoded. The
    "reasoning_details" of OpenRouter go with the next tool call, in its ``extra``.
    """

    LINE_LIMIT = 16 << 20  # bytes

    def __init__(self, upstream_name: str = "the upstream", secrets: Iterable[str] = ()) -> None:
        self.upstream_name, self.secrets = upstream_name, secrets
        self.lines = EventLines()
        self.calls = ToolCallAssembler(upstream_name)
        self.reason: str | None = None
        self.stop_sequence = ""
        self.usage: dict[str, Any] = {}  # as the upstream has sent it

    def feed(self, data: bytes) -> list[Event]:
        out, lines = self._decode(self.lines.feed(data)), self.lines
        self.started = self.started or bool(out)
        if (lines.data or lines.buffer) and lines.size + len(lines.buffer) > self.LINE_LIMIT:
            self.error = truncated(self.upstream_name, "sent an event that is too long")
        return out

    def close(self) -> list[Event]:
        return self._decode(itertools.chain(self.lines.close(), [(b"", b"[DONE]")]))

    def decode_body(self, body: dict[str, Any]) -> list[Event]:
        """Return the events of a completion that is not streamed. Raises APIError."""
        out: list[Event] = []
        self._completion(body, "message", out)
        if self.reason is None and not out:
            raise truncated(self.upstream_name, "sent something that is not a completion")
        self._finish(out)
        return out

    def _decode(self, events: Iterable[tuple[bytes, bytes]]) -> list[Event]:
        out: list[Event] = []
        for event_type, data in events:
            try:
                self._event(event_type, data.strip(), out)
            except APIError as error:
                self.error = error
            if self.complete or self.error:
                self.lines = EventLines()
                break
        return out

    def _event(self, event_type: bytes, data: bytes, out: list[Event]) -> None:
        """Decode one event. Raises the APIError that it stands for."""
        if data == b"[DONE]":
            if self.reason is None:
                raise truncated(self.upstream_name)
            self._finish(out)
            return
        event = json_or_none(data)
        if event_type == b"error" and data:
            raise error_from_body(self.upstream_name, 200, event or data, self.secrets)
        is_message = event_type in (b"", b"message") and self.reason is None
        if event is None and is_message and data not in (b"", b"null"):
            raise truncated(self.upstream_name, "sent an event that is not JSON")
        if isinstance(event, dict):
            self._completion(event, "delta", out)

    def _completion(self, body: dict[str, Any], key: str, out: list[Event]) -> None:
        """Decode a chunk, or a whole completion, whose choices have ``key``."""
        if (body.get("error") or not body.get("choices")) and is_chat_error(body):
            raise error_from_body(self.upstream_name, 200, body, self.secrets)
        usage = find_usage(body)
        if usage:
            self.usage = merge_counts(self.usage, as_dict(usage))
        for choice in map(as_dict, as_list(body.get("choices"))):
            if choice.get("error"):
                raise error_from_body(self.upstream_name, 200, choice, self.secrets)
            if not choice.get("index"):
                # Some stream a whole completion; others, such as MiniMax, repeat it at the end.
                full = choice.get(key) or not (out or self.started) and choice.get("message")
                message = as_dict(full) or {"content": choice.get("text")}
                if "reasoning_details" in message:
                    self.calls.add_details(message["reasoning_details"])
                for each in message_events(message):
                    if isinstance(each, ToolCall):
                        out += self.calls.add(each, is_complete=key != "delta" or key not in choice)
                    else:
                        out.append(each)
                reason = as_str(choice.get("finish_reason"))
                self.reason = self.reason if reason in ("", "null", "None") else reason
                for name in ("stop_reason", "matched_stop"):  # vLLM's and SGLang's
                    self.stop_sequence = as_str(choice.get(name)) or self.stop_sequence

    def _finish(self, out: list[Event]) -> None:
        reason = finish_reason(self.upstream_name, self.reason or "", self.calls.close())
        self.complete = True
        out.append(Finish(reason, chat_usage(self.usage), self.stop_sequence or None))


class CallInProgress:
    """A tool call of which fragments have arrived; its arguments are a JSON object."""

    _MARKS = re.compile(r'\\.?|["{}\[\]]', re.S)
    EMPTY = ("", "{}", "null", '""')  # some servers begin with it

    def __init__(self, number: int) -> None:
        self.number = number
        self.id: str | None = None
        self.name: str | None = None
        self.extra: dict[str, Any] = {}  # the upstream's own fields
        self.arguments: list[str] = []  # their fragments
        self.size = 0  # characters of them
        self.depth, self.in_string, self.opened = 0, False, False
        self.escape = ""  # a backslash whose character is still to come

    @property
    def complete(self) -> bool:
        return self.opened and not self.depth and not self.in_string

    def feed(self, text: str) -> str:
        """Add a fragment of the arguments; return what is new in it."""
        # Some servers send with each fragment all of them so far, or at the end all of them again;
        # others a JSON string with the object, or something behind it.
        if not self.size and text.startswith('"{'):
            text = json_or_none(text.encode("utf-8", "replace")) or text
        elif not self.size:
            text = text.removeprefix("{}") or text
        if self.opened and self.size <= len(text) and text.startswith("".join(self.arguments)):
            text = text[self.size :]
        if self.size and self.complete:
            return ""
        text = text[: self._scan(text)]
        if not self.size and text.strip() in self.EMPTY:
            return ""
        self.arguments.append(text)
        self.size += len(text)
        return text

    def differs(self, text: str) -> bool:
        """Whether text begins an object other than the arguments, which are complete."""
        self.arguments = ["".join(self.arguments)]
        return text[:1] == "{" and text != "{}" and not self.arguments[0].startswith(text)

    def _scan(self, text: str) -> int:
        """Return how much of a fragment belongs to the object; all of it if there is none."""
        if not self.size:
            self.opened = text.lstrip().startswith(("{", "["))
        if not self.opened:
            return len(text)
        before, self.escape = self.escape, ""
        for match in self._MARKS.finditer(before + text):
            mark = match[0]
            if mark == '"':
                self.in_string = not self.in_string
            elif mark == "\\":
                self.escape = mark
            elif mark in "{}[]" and not self.in_string:
                self.depth += 1 if mark in "{[" else -1
                if not self.depth:
                    return match.end() - len(before)
        return len(text)


class ToolCallAssembler:
    """Numbers tool calls and joins their fragments, however a server labels them.

    A fragment belongs to the latest call with its ID; else to that of its index, or if the index is
    new and the fragment has no name, to the latest call of all. It begins a call instead if there
    is none, or if it has a name and that call

    * has another name, or
    * has another ID, and its arguments are complete or have not begun, or
    * has complete arguments, and the fragment has no ID or begins other ones.

    So a new ID alone begins nothing: some servers send one with each fragment. A call is passed on
    from its name on, which may come after its ID; ID and name are sent once.
    """

    def __init__(self, upstream_name: str) -> None:
        self.upstream_name = upstream_name
        self.calls: list[CallInProgress] = []
        self.by_id: dict[str, CallInProgress] = {}
        self.by_index: dict[int, CallInProgress] = {}
        self.latest: CallInProgress | None = None
        self.details: list[dict[str, Any]] = []  # OpenRouter's fragments of reasoning_details
        self.details_room = 1 << 16  # characters; with more of them, none go with a call

    def add(self, fragment: ToolCall, is_complete: bool = False) -> list[Event]:
        """Return the events of a fragment. APIError if there are too many calls."""
        call = self.by_id.get(fragment.id or "") or self.by_index.get(fragment.index)
        if not (call or fragment.name or fragment.id):
            call = self.latest
        if is_complete or call is None or self._begins_another(call, fragment):
            call = self._begin(fragment)
        self.by_index[fragment.index] = self.latest = call
        if call.id is None and fragment.id:
            call.id = fragment.id
            self.by_id.setdefault(fragment.id, call)
        call.extra = fragment.extra or call.extra
        text = call.feed(fragment.arguments)
        if call.name is not None:
            return [ToolCall(call.number, text)] if text else []
        if not fragment.name:
            return []
        call.name = fragment.name
        extra = {**call.extra, **self._take_details()} or None
        return [ToolCall(call.number, "".join(call.arguments), call.id, call.name, extra)]

    def add_details(self, details: Any) -> None:
        """Join fragments of OpenRouter's reasoning_details, to go with the next call."""
        for detail in map(as_dict, as_list(details) if self.details_room >= 0 else ()):
            self.details_room -= len(_encode(detail))
            joined = self.details[-1] if self.details else {}
            is_same = all(detail.get(name) == joined.get(name) for name in ("type", "index"))
            if detail.get("index") is None or not is_same:
                joined = {}
                self.details.append(joined)
            for name, value in detail.items():
                if name in ("text", "summary") and isinstance(value, str):
                    joined[name] = as_str(joined.get(name)) + value
                elif value is not None:
                    joined[name] = value

    def close(self) -> bool:
        """Return whether there was a call. APIError if one has arguments but no name."""
        if any(call.name is None and (call.size or call.opened) for call in self.calls):
            raise truncated(self.upstream_name, "sent a tool call without a name")
        return any(call.name for call in self.calls)

    def _take_details(self) -> dict[str, Any]:
        """Return what goes with the next call: details that are more than text."""
        details, self.details = self.details, []
        is_opaque = any(detail.get("data") or detail.get("signature") for detail in details)
        return {"reasoning_details": details} if is_opaque and self.details_room >= 0 else {}

    @staticmethod
    def _begins_another(call: CallInProgress, fragment: ToolCall) -> bool:
        if not fragment.name or call.name is None:
            return False
        if fragment.name != call.name:
            return True
        if fragment.id and call.id and fragment.id != call.id:
            return call.complete or not call.opened
        return call.complete and (not fragment.id or call.differs(fragment.arguments))

    def _begin(self, fragment: ToolCall) -> CallInProgress:
        if len(self.calls) == MAX_TOOL_CALLS:
            raise too_many_calls(self.upstream_name)
        call = CallInProgress(len(self.calls))
        self.calls.append(call)
        if fragment.id and fragment.id in self.by_id:  # the dialects make another ID
            call.id, self.by_id[fragment.id] = "", call
        return call


def message_events(message: dict[str, Any]) -> list[Event]:
    """Return the events of a stream's delta or of a complete message."""
    events: list[Event] = []
    images = as_list(message.get("images"))  # OpenRouter's and LiteLLM's
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name)), None)
    content, declined = message.get("content"), message.get("refusal")
    content = content or as_dict(message.get("audio")).get("transcript")
    if isinstance(content, (list, dict)):
        parts = content if isinstance(content, list) else [content]
        reasoning = reasoning or list(filter(is_reasoning, parts))
        content = joined_text(list(itertools.filterfalse(is_reasoning, parts)))
        images = [*images, *parts]
    reasoning = joined_text(reasoning)
    if reasoning:
        events.append(Reasoning(reasoning))
    if isinstance(content, str) and content:
        events.append(Text(content))
    if declined and isinstance(declined, str):
        events.append(Refusal(declined))
    if "annotations" in message:
        given = map(as_dict, as_list(message["annotations"]))
        events += [Citation(each) for each in given if as_dict(each.get("url_citation")).get("url")]
    for image in images:
        source = as_dict(image).get("image_url")
        url = as_str(as_dict(source).get("url", source))
        events += [Image("", "", "", url)] if url else []
    calls = message.get("tool_calls")
    calls = [calls] if isinstance(calls, dict) else as_list(calls)  # one, in a stream of TGI's
    if isinstance(message.get("function_call"), dict):
        calls = [{"index": 0, "function": message["function_call"]}]
    for position, call in enumerate(map(as_dict, calls)):
        function = as_dict(call.get("function")) or call
        arguments = function.get("arguments") or function.get("parameters") or ""
        index = call.get("index")
        if type(index) is not int or index >> 31:  # some send a string or a float
            digits = str(index).removesuffix(".0")
            index = int(digits) if re.fullmatch("[0-9]{1,9}", digits) else position
        arguments = arguments if isinstance(arguments, str) else _encode(arguments)
        call_id, name = name_or_none(call.get("id")), name_or_none(function.get("name"))
        extra = {field: call[field] for field in call if field not in CALL_FIELDS and call[field]}
        events.append(ToolCall(index, arguments, call_id, name, extra or None))
    return events


def is_reasoning(part: Any) -> bool:
    """Whether a part of a message's content is reasoning."""
    return as_dict(part).get("type") in ("thinking", "reasoning")


def joined_text(value: Any) -> str:
    """Return text that is a string, an object with it, or a list of these."""
    if isinstance(value, list):
        return "".join(map(joined_text, value))
    if isinstance(value, dict):
        fields = map(value.get, ("text", "thinking", "summary", "content", "value", "refusal"))
        return joined_text(next(filter(None, fields), None))
    return as_str(value)


def name_or_none(value: Any) -> str | None:
    """Return a string as it is, an integer as a string; None for anything else."""
    return value if isinstance(value, str) else str(value) if type(value) is int else None


# fmt: off
# Fields of a message, by rank, and of a tool call.
REASONING_FIELDS = (
    "reasoning_content", "reasoning", "reasoning_text", "thinking", "reasoning_details",
)
CALL_FIELDS = ("index", "id", "type", "function", "name", "arguments", "parameters")
# What reasons to end mean, by the first pattern that they contain in lower case. OpenAI's names are
# on the left; servers send several dozen others (max_tokens, model_length, SAFETY, sensitive,
# tool_use, insufficient_system_resource ...). An unknown reason after an answer is a "stop".
FINISH_REASONS: list[tuple[str, str]] = [
    ("stop",           r"^(?:stop|eos|end|done|complete)"),
    ("error",          r"error|fail|abort|cancel|malformed|unexpected|overload|timeout|timed_out"
                       r"|rate_limit|resource|unavailable|interrupt|network|exhausted|quota|kill|^oom"
                       r"|out_of_|shutdown|deadline|preempt|missing|too_many|insufficient|busy"
                       r"|credit|load_shed|internal|crash|disconnect|lost"),
    ("length",         r"length|token|context|limit"),
    ("content_filter", r"filter|safety|sensitive|refus|block|prohibit|moderat|policy|recitation"
                       r"|spii|guardrail|inspect|violat|armor|flagged|risk|harmful|nsfw|abus"
                       r"|danger|complian|toxic|censor"),
    ("tool_calls",     r"tool|function"),
    ("stop",           r""),
]
# fmt: on


def finish_reason(upstream_name: str, reason: str, has_calls: bool) -> str:
    """Return OpenAI's word for why an answer ended. APIError if it failed."""
    words = reason[:200].lower()
    meaning = next(name for name, words_of in FINISH_REASONS if re.search(words_of, words))
    if meaning == "error":
        reason = shorten(reason, 40)
        raise truncated(upstream_name, f"ended its answer with the reason {reason!r}")
    if meaning in ("stop", "tool_calls"):  # some servers say "stop" after tool calls
        return "tool_calls" if has_calls else "stop"
    return meaning


def find_usage(body: dict[str, Any]) -> Any:
    """Return the usage of a completion or an event, wherever servers put it."""
    usage = body.get("usage")
    if usage is None and ("x_groq" in body or "choices" in body):
        choice = as_dict(next(iter(as_list(body.get("choices"))), None))
        usage = as_dict(body.get("x_groq")).get("usage") or choice.get("usage")
    return usage


_JSON = json.JSONDecoder()
MAX_USAGE = 4096  # bytes of a usage object
MAX_USAGES = 16  # that are parsed; all but one may be null, or tools' own


def last_usage(data: bytes) -> dict[str, Any]:
    """Return the counts in the last objects named "usage" in JSON; {} without any."""
    counts: dict[str, Any] = {}
    at = len(data)
    for _ in range(MAX_USAGES):
        at = data.rfind(b'"usage"', 0, at)
        if at < 0:
            break
        text = data[at + len(b'"usage"') : at + MAX_USAGE].decode("utf-8", "replace")
        try:
            usage, _ = _JSON.raw_decode(text.lstrip(" \t\r\n:"))
        except (ValueError, RecursionError):
            continue
        counts = merge_counts(as_dict(usage), counts)
    return counts


def merge_counts(*usages: dict[str, Any]) -> dict[str, Any]:
    """Merge usages that have counts; null and 0 do not replace a count."""
    merged: dict[str, Any] = {}
    for usage in usages:
        if any(map(count_or_none, usage.values())):
            given = {name: n for name, n in usage.items() if n or name not in merged}
            merged.update(given)
    return merged


class StreamEnd(NamedTuple):
    """The end of a path's streams: each complete one has a match of the pattern.

    Group 1 is the line break after the last event.
    """

    pattern: Pattern[bytes]
    hints: tuple[bytes, ...]  # one is in every match, and rfind() is faster than the pattern
    mid_stream: tuple[bytes, ...] = ()  # ends of typical events that need no search for a match

    def matches(self, data: bytes, start: int = 0) -> Iterable[re.Match[bytes]]:
        """Return the matches in data from an index on, which is the start of a line."""
        # Mostly there is none, which find() notices in three times as long as rfind().
        hints = [hint for hint in self.hints if data.rfind(hint, start) >= 0]
        found = [self._match_start(data, hint, start) for hint in hints]
        return self.pattern.finditer(data, min(found)) if found else ()

    def _match_start(self, data: bytes, hint: bytes, start: int) -> int:
        """Return where the first match with a hint may begin: a name, or its line."""
        at = data.find(hint, start)
        return at if hint.startswith(b'"') else max(0, data.rfind(b"\n", 0, at))

    def mid_stream_length(self, data: bytes) -> int:
        """Return the length of typical events at the start of data; 0 if not all are."""
        for end in self.mid_stream:
            length = data.rfind(end) + len(end)
            if length >= len(end):  # each line break must belong to such an end
                events = data[:length]
                breaks = length - len(events.replace(b"\n", b""))  # in half the time of count()
                return length if breaks == 2 * events.count(end) else 0
        return 0


DONE = rb"(?:^|[\r\n])data: *\[DONE\] *(\r\n?|\n|$)"
REST_OF_LINE = rb'"[^\r\n]*(\r\n?|\n|$)'
DONE_ONLY = StreamEnd(re.compile(DONE), (b"[DONE]",))
# fmt: off
CHAT_END = StreamEnd(
    re.compile(DONE + rb'|"finish_reason" ?: ?"(?!null")[A-Za-z]'),
    (b"[DONE]", b'"finish_reason":"', b'"finish_reason": "', b'"finish_reason" :'),
    (b'"finish_reason":null}]}\n\n', b'"finish_reason": null}]}\n\n',
     b'"finish_reason":null}],"usage":null}\n\n'),
)
STREAM_ENDS = {
    CHAT_PATH: CHAT_END,
    "/v1/completions": CHAT_END,
    "/v1/messages": StreamEnd(
        re.compile(rb'"type" ?: ?"(?:message_stop%b|error")|"stop_reason" ?: ?"[a-z]'
                   % REST_OF_LINE),
        (b"message_stop", b"error", b'"stop_reason":"', b'"stop_reason": "')),
    "/v1/responses": StreamEnd(
        re.compile(rb'"type" ?: ?"(?:response\.(?:completed|incomplete|failed)%b|error")'
                   % REST_OF_LINE),
        (b"response.completed", b"response.incomplete", b"response.failed", b"error")),
}
# fmt: on


class ModelName:
    """Replaces the name of a relayed answer's model; for calls by an alias ("": none)."""

    FIELD = re.compile(rb'"model"\s{0,9}:\s{0,9}"(?:[^"\\\r\n]|\\.){0,1000}"')

    def __init__(self, name: str) -> None:
        self.field = b'"model":' + to_json(name) if name else b""
        self.answered = b""  # the upstream's field

    def __call__(self, data: bytes) -> bytes:
        if self.field and not self.answered:
            match = self.FIELD.search(data)
            self.answered = match[0] if match else b""
        # No string contains it, as quotes are escaped there.
        return data.replace(self.answered, self.field) if self.answered else data


class UnparsedBody(Decoder):
    """Passes on a body of an unknown format as it arrives."""

    started = True

    def feed(self, data: bytes) -> list[Event]:
        return [RawBytes(data)]


class PassthroughDecoder(Decoder):
    """Passes on a stream in the client's own format, byte for byte, as RawBytes.

    Only the opening and the end are parsed; secrets are redacted from errors. What precedes the
    first content is held back, since until then another controller may still answer. Only complete
    lines are passed on, so that an error event can follow if the upstream breaks off. Without an
    ``end`` that of the HTTP message suffices. ``model`` replaces the name of the answer's model.
    """

    MAX_HELD = 16 << 20  # bytes
    LAST_PARTS = 8  # with "usage"; it is in one of them
    has_fast_path = True

    def __init__(
        self,
        name: str,
        end: StreamEnd | None = None,
        secrets: Iterable[str] = (),
        model: str = "",
    ) -> None:
        self.upstream_name, self.end, self.secrets = name, end or DONE_ONLY, secrets
        self.rename = ModelName(model)
        self.end_seen = end is None
        # Of typical events only errors are looked for: of a burst of tokens nearly all are.
        self.mid_stream = () if model else self.end.mid_stream
        self.buffer = bytearray()  # an incomplete line
        self.opening = bytearray()  # what precedes the first content
        self.first_usage: dict[str, Any] = {}  # that of the opening; Anthropic's counts the prompt
        self.last_parts: deque[bytes] = deque(maxlen=self.LAST_PARTS)  # except mid-stream ones
        self.tail = b"\n\n"  # of what has been passed on, except mid-stream parts

    def feed(self, data: bytes) -> list[Event]:
        if self.buffer or not data.endswith(b"\n"):
            data = take_complete_lines(self.buffer, data)
        if not self.started:
            data = self._without_opening(data)
            self.first_usage = last_usage(data[:MAX_USAGE])
        typical = self.end.mid_stream_length(data) if self.mid_stream else 0
        # Some errors have only the name of their event. rfind() takes half the time of ``in``.
        if data.rfind(b'"error') >= 0 or data.rfind(b"event: error", typical) >= 0:
            data, typical = redact_bytes(data, self.secrets), 0
        if len(self.buffer) + len(self.opening) > self.MAX_HELD:
            self.error = truncated(self.upstream_name, "sent a line that is too long, or no answer")
        if not data:
            return []
        if typical < len(data):
            data = self._find_end(self.rename(data), typical)
        self._note(data, typical)
        return [RawBytes(data, self._usage() if self.complete else None)]

    def _note(self, data: bytes, typical: int = 0) -> None:
        """Remember what is needed of a part that is passed on."""
        self.tail = (self.tail + data[-3:])[-3:]
        if data.rfind(b'"usage"', typical) >= 0:
            self.last_parts.append(data[typical:])

    def _usage(self) -> dict[str, Any] | None:
        """Return the usage of the answer so far."""
        counts = last_usage(b"".join(self.last_parts))
        return chat_usage(merge_counts(self.first_usage, counts))

    def fast_path(self, data: bytes) -> bytes:
        """Return data that consists of complete mid-stream events only, else b""."""
        if (
            self.started
            and not self.buffer
            and data.endswith(self.mid_stream)
            and data.rfind(b'"error') < 0
            and (data.find(b"\n") == len(data) - 2 or self.end.mid_stream_length(data) == len(data))
        ):
            return data
        return b""

    def _find_end(self, data: bytes, typical: int = 0) -> bytes:
        """Return the data up to the stream's last event, if it contains that."""
        start = typical
        for match in self.end.matches(data, typical):
            if not self._is_own(match, start):
                start = match.end()
                continue
            self.end_seen, line_break = True, match[1]
            if line_break:
                self.complete = True
                # Ends the relay at once: append the blank line, which may still be in transit
                rest = data[match.end() :]
                return data if rest == line_break else data[: match.end()] + line_break
        return data

    def _is_own(self, match: re.Match[bytes], start: int) -> bool:
        """Whether a match after ``start`` is of an event's type, not of an object within."""
        if match[1] is None or not match[0].startswith(b'"type"'):
            return True
        head = match.string[start : match.start()].replace(b"\r", b"\n").rpartition(b"\n")[2]
        if FIRST_KEY.fullmatch(head):
            return True
        event = json_or_none((head + match[0]).partition(b"data:")[2])
        own_type = b'"type":' + to_json(as_dict(event).get("type"))
        return event is None or self.end.pattern.match(own_type) is not None

    def _without_opening(self, data: bytes) -> bytes:
        """Hold data back until the first content; set ``error`` if an error comes instead."""
        for line in DATA_LINE.finditer(data.replace(b"\r", b"\n")):
            field, value = line[1], line[2].strip()
            # The opening and the first token of nearly all servers need not be parsed.
            typical = TYPICAL.search(value) if field == b"data" else None
            if typical and value.find(b'"error') < 0:
                if not typical[1]:
                    continue
                self.started = True
                break
            event = json_or_none(value) if value.startswith(b"{") else None
            failure = None if event is None else self._error_in(event)
            if field != b"data":  # an event of the type "error"
                failure = failure or event or value
            if value == b"[DONE]":
                self.error = truncated(self.upstream_name, "ended its answer before it began")
            elif failure:
                self.error = error_from_body(self.upstream_name, 200, failure, self.secrets)
            elif value not in (b"", b"null") and (event is None or self._has_content(event)):
                self.started = True
            if self.error or self.started:
                break
        if not self.started:
            self.opening += data
            return b""
        opening, self.opening = self.opening, bytearray()
        return bytes(opening) + data if opening else data

    def _has_content(self, event: dict[str, Any]) -> bool:
        """Whether an event carries content or an end, not just an opening."""
        choices, is_chat = event.get("choices"), self.end is CHAT_END
        if isinstance(event.get("type"), str) and not is_chat:
            return not OPENING_TYPES.fullmatch(event["type"])
        if not isinstance(choices, list):
            return not is_chat
        for choice in map(as_dict, choices):
            delta = as_dict(choice.get("delta"))
            if any({**choice, **delta, "delta": None, "role": None, "index": 0}.values()):
                return True
        return False

    def _error_in(self, event: dict[str, Any]) -> Any:
        """Return the object with the error of an opening event; None without an error."""
        if event.get("type") == "response.failed":
            return event.get("response")
        failed = is_chat_error(event) if self.end is CHAT_END else is_error(event)
        return event if failed else None

    def close(self) -> list[Event]:
        data = bytes(self.opening + self.buffer)
        self.buffer, self.opening = bytearray(), bytearray()
        if not self.end_seen:
            self._find_end(data)
        if not self.end_seen:
            self.error = truncated(self.upstream_name)
            return self.flush()
        data = self.rename(data)
        self._note(data)
        usage = self._usage()
        return [RawBytes(data, usage)] if data or usage else []

    def flush(self) -> list[Event]:
        """Drop an incomplete line and end an incomplete event: an error may follow."""
        self.buffer.clear()
        between_events = self.tail.endswith((b"\n\n", b"\n\r\n", b"\r\r"))
        return [RawBytes(b"\n")] if self.started and not between_events else []


FIRST_KEY = re.compile(rb"data:\s{0,9}\{\s{0,9}")  # what precedes it in a line
DATA_LINE = re.compile(rb"(?:^|\n|^\xef\xbb\xbf)(event: ?error\n\n?data|data|error):(.*)(?=\n)")
TYPICAL = re.compile(  # group 1: a token
    rb'"delta": ?\{(?:("(?:content|reasoning_content|reasoning)": ?"[^"])'
    rb'|"role": ?"assistant", ?"content": ?"" ?\}, ?"finish_reason": ?null ?\} ?\] ?\}$)'
)
OPENING_TYPES = re.compile(
    r"ping|keepalive|message_start|content_block_start|response\.(created|queued|in_progress|\w+\.added)"
)


def is_error(body: Any) -> bool:
    """Whether a JSON body that came with status 200 is an error instead of an answer."""
    body = as_dict(body[0] if isinstance(body, list) and body else body)
    if body.get("object") == "response" or any(map(body.get, _ANSWER_FIELDS)):
        return any(as_dict(choice).get("error") for choice in as_list(body.get("choices")))
    names_error = "error" in (body.get("object"), body.get("type"))
    return bool(body.get("error") or body.get("errors") or names_error)


def is_chat_error(body: dict[str, Any]) -> bool:
    """Whether a completion or an event is an error, maybe just a code and words."""
    has_words = not body.get("choices") and error_words(error_fields(body)) != ""
    return bool(body.get("error")) or is_error(body) or has_words


def replace_form_model(call: Call, name: str) -> bytes:
    """Return the form of a call with another model name, which is a valid one."""
    field, data = call.original.form_model, call.original.raw_body
    if name == field.value:
        return data
    is_urlencoded = "urlencoded" in call.original.content_type.lower()
    value = urllib.parse.quote_plus(name) if is_urlencoded else name
    return data[: field.start] + value.encode() + data[field.end :]


_ANSWER_FIELDS = ("choices", "data", "output", "content")
# The list that answers on a path have; its first item is an object that is not empty.
ANSWER_FIELDS = {CHAT_PATH: b"choices", "/v1/completions": b"choices", "/v1/embeddings": b"data"}
ANSWER = re.compile(rb'"(?:choices|data)"\s{0,20}:\s{0,20}\[\s{0,20}\{\s{0,20}"')


def is_streamed(kind: str, opening: bytes, requested: bool) -> bool:
    """Return whether a body is an event stream, by media type or first character."""
    # Servers send requested streams as application/json, as text/plain or without a type.
    first = opening.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind == "text/event-stream":
        return first not in (b"{", b"[")
    is_text = kind.partition("/")[0] in ("", "text", "application", "binary")
    return requested and is_text and first != b"" and first in b":deir\xef"


class OpenAIController(Controller):
    """OpenAI-compatible upstream: relays the formats it speaks, translates others."""

    NOT_NATIVE_BY_DEFAULT = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses")

    def __init__(self, options: ControllerSettings, settings: Settings) -> None:
        super().__init__(options, settings)
        headers = dict(options.headers)
        if options.api_key:
            headers["Authorization"] = f"Bearer {options.api_key}"
        if options.cookie:
            headers["Cookie"] = options.cookie
        self.secrets = [options.api_key, *option_secrets(options)]
        self.redact_type = functools.lru_cache(maxsize=64)(lambda text: redact(text, self.secrets))
        has_path = urllib.parse.urlsplit(options.base_url).path
        base_url = options.base_url if has_path else options.base_url + "/v1"
        endpoint = re.search("/(?:chat/)?(?:completions|responses|embeddings)$", base_url)
        if endpoint:  # a reverse proxy may serve the API below such a path
            message = "%s: its base_url ends in %s; if that is an endpoint, set it to %s"
            log.warning(message, self.name, endpoint[0], base_url[: endpoint.start()])
        self.transport = Transport(options, settings, base_url, self.name, headers)
        self.model_cache = Cache(f"{self.name}: models", self._fetch_models)

    def speaks(self, path: str) -> bool:
        """Whether the upstream itself offers an API path; False for a rewritten chat."""
        if not path:
            return False
        if self.options.paths:
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.options.paths)
        return path not in self.NOT_NATIVE_BY_DEFAULT

    def check_support(self, call: Call) -> APIError | None:
        path = call.original.path
        if self.speaks(path):
            return None
        if call.relay_only or call.image_count:
            return APIError(404, f"{self.name} does not offer {path}.", code="not_found")
        return call.translation_error

    def events(self, call: Call) -> Iterable[Event]:
        original, is_native = call.original, self.speaks(call.original.path)
        path = (original.path + original.query if is_native else CHAT_PATH)[len("/v1") :]
        data, content_type = self._request(call, is_native)
        headers = {**original.headers, "Content-Type": content_type}
        response = self.transport.start_request(
            "POST", path, call.scope, data, headers, retry_reason=call.attempt.retry_reason
        )
        return EventStream(response, lambda response: self._decoder(call, response, is_native))

    def _request(self, call: Call, is_native: bool) -> tuple[bytes | bytearray, str]:
        """Return the request body and its content type; unchanged bodies are not rebuilt."""
        name = self.upstream_model(call.model)
        if is_native and call.original.form_model:
            return replace_form_model(call, name), call.original.content_type
        original = call.original.body or {}
        body = original if is_native else self._translated(call)
        if "model" in body and body["model"] != name:
            body = {**body, "model": name}
        is_chat = not call.relay_only and not call.image_count
        body, dropped = adapt_body(body, self.options, is_chat) if body else (body, [])
        # a second "model" in the bytes could differ from the one that was authorized
        is_same = is_native and body is original and not call.original.is_changed
        if is_same and not (body and call.original.raw_body.count(b'"model"') > 1):
            return call.original.raw_body, call.original.content_type
        call.attempt.ignored_params = dropped
        return request_json(body, len(call.original.raw_body)), "application/json"

    def _translated(self, call: Call) -> dict[str, Any]:
        """The body of a request in a format that the upstream does not offer, as a chat."""
        messages = place_system_messages(call.body["messages"], self.options.system_messages)
        options = {"stream_options": {"include_usage": True}} if call.stream else {}
        sent = {name: call.body[name] for name in call.body if name not in call.untranslated}
        return {**sent, "messages": messages, **options}

    def _decoder(self, call: Call, response: UpstreamResponse, is_native: bool) -> Decoder:
        """Return the decoder for the body of a response."""
        if not 200 <= response.status < 300:
            return BufferedBody(
                lambda data: self._status_error(response, data, call.model), is_error_body=True
            )
        kind = media_type(response.headers.get("content-type", ""))
        requested = as_dict(call.original.body).get("stream") is True
        streamed = is_streamed(kind, response.opening, requested)
        if is_native and (call.relay_only or streamed == call.stream):
            return self._relay(call, response, kind, streamed)
        if streamed:
            return DecoderChain(ChatDecoder(self.name, self.secrets), SurrogateFilter())
        return BufferedBody(self._completion)

    def _relay(self, call: Call, response: UpstreamResponse, kind: str, streamed: bool) -> Decoder:
        """Return the decoder for a response in the client's own format, of a media type."""
        renamed = call.requested_model if call.requested_model != call.model else ""
        content_type = self.redact_type(response.headers.get("content-type", ""))
        call.attempt.status = response.status
        call.attempt.content_type = content_type or "application/octet-stream"
        if streamed:
            if kind != "text/event-stream":
                call.attempt.content_type = "text/event-stream"
            end = STREAM_ENDS.get(call.original.path)
            return PassthroughDecoder(self.name, end, self.secrets, renamed)
        if kind == "text/html":
            raise APIError(502, f"{self.name} answered with a web page.")
        until_close, field = response.body.until_close, ANSWER_FIELDS.get(call.original.path, b"")
        is_document = is_json_type(kind)
        if is_document or field or not call.relay_only:
            if not is_document:
                call.attempt.content_type = "application/json"
            return BufferedBody(functools.partial(self._document, field, until_close, renamed))
        if until_close or not response.body.done:
            return UnparsedBody()
        return BufferedBody(lambda data: [RawBytes(data)])

    def _document(self, field: bytes, until_close: bool, model: str, data: bytes) -> list[Event]:
        """Check and pass on a complete JSON body; APIError if it is an error or no answer.

        Each answer has the ``field``. The body is parsed only if it may be an error, or if it ends
        with the connection: then nothing else shows whether it is complete.
        """
        text = data.removeprefix(b"\xef\xbb\xbf").strip()
        if not text or until_close and json_or_none(text) is None:
            raise truncated(self.name)
        if text[:1] not in b"{[" or text[-1:] not in b"}]":
            raise truncated(self.name, "sent something that is not JSON")
        if not ANSWER.search(text) or text.rfind(b'"error"') >= 0 or text.rfind(b'"errors"') >= 0:
            body = json_or_none(data)
            items = as_list(as_dict(body).get(field.decode()))
            is_answer = not field or as_dict(next(iter(items), None)) != {}
            has_words = not is_answer and error_words(error_fields(body)) != ""
            is_cut_off = body is None and text[1:].lstrip().startswith(b'"error"')
            if is_error(body) or has_words or is_cut_off:
                raise error_from_body(self.name, 200, data if body is None else body, self.secrets)
            if not is_answer:
                raise truncated(self.name, "sent something that is not an answer")
            data = redact_bytes(data, self.secrets)
        return [RawBytes(ModelName(model)(data), chat_usage(last_usage(text)))]

    def _completion(self, data: bytes) -> list[Event]:
        """Return the events of a chat completion that is not streamed."""
        body = json_or_none(data)
        if is_error(body):
            raise error_from_body(self.name, 200, body, self.secrets)
        return ChatDecoder(self.name, self.secrets).decode_body(as_dict(body))

    def _status_error(self, response: UpstreamResponse, data: bytes, model: str) -> NoReturn:
        body, models = json_or_none(data), (model, self.upstream_model(model))
        body, headers = data if body is None else body, response.headers
        raise error_from_body(self.name, response.status, body, self.secrets, headers, models)

    def _fetch_models(self) -> tuple[list[dict[str, Any]], float]:
        response, body = self.transport.get_json("/models")
        if response.status != 200:
            raise error_from_body(self.name, response.status, body, self.secrets, response.headers)
        models = as_list(body.get("data") if isinstance(body, dict) else body)
        named = ((entry.get("id"), entry) for entry in map(as_dict, models))
        entries = bounded_model_list(self.name, named).values()
        if not entries:
            message = f"{self.name} sent no list of models."
            raise APIError(503, message, upstream_status=response.status)
        for entry in entries:
            entry["created"] = count_or_none(entry.get("created")) or 0
        common = {"object": "model", "owned_by": self.name}
        models = [with_context_length({**common, **entry}, entry) for entry in entries]
        return models, self.settings.models_ttl


class EchoController(Controller):
    """Echoes the last message at a chosen speed, for testing clients offline and free."""

    MAX_WORDS = 10_000  # sent one by one; the last piece holds the remaining text

    def check_support(self, call: Call) -> APIError | None:
        if call.relay_only or call.image_count or call.translation_error:
            message = f"{self.name} supports chat completions only."
            return call.translation_error or APIError(404, message, code="not_found")
        return None

    def events(self, call: Call) -> Iterator[Event]:
        words = re.split(r"(?<=\S)(?=\s)", call.text, maxsplit=self.MAX_WORDS - 1)
        for word in words:
            if self.options.speed:
                call.cancellation.sleep(1 / self.options.speed)
            yield Text(word)
        count = len(words)
        usage = {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}
        yield Finish("stop", usage)

    def models(self) -> list[dict[str, Any]]:
        return [{"id": "echo", "object": "model", "created": 0, "owned_by": self.name}]


CONTROLLERS: dict[str, Callable[[ControllerSettings, Settings], Controller]] = {
    "openai": OpenAIController,
    "akash": AkashController,
    "echo": EchoController,
}


# == 14. pool =================================================================================
# Chooses an upstream for each request and fails over to the next. Knows no sockets and no wire
# formats. A request's way: Exchange.attempt -> Pool.acquire -> Controller.events -> commit (or
# fail_over, then attempt again) -> Exchange.close -> Pool.release.


class FailurePolicy(NamedTuple):
    """Consequences of an error category for the request and for its controller."""

    fail_over: bool  # whether another controller may serve the request
    cool_down_after: int | None = None  # consecutive failures; None: never, and not counted
    summary: str = ""  # in /status; upstreams' messages may quote other clients' requests


FAILURE_POLICY = {
    Category.RETRY: FailurePolicy(True),
    Category.LOCAL: FailurePolicy(False),
    Category.UNSUPPORTED: FailurePolicy(True),
    Category.MODEL: FailurePolicy(True),
    Category.AUTH: FailurePolicy(True, 1, "the upstream refuses the key"),
    Category.REFUSED: FailurePolicy(True),
    Category.REQUEST: FailurePolicy(False),
    Category.SERVER: FailurePolicy(True, 3, "server error"),
    Category.CUT: FailurePolicy(True, 1, "connection failed or was cut off"),
    Category.NETWORK: FailurePolicy(True, 1, "connection failed or was cut off"),
    Category.RATE_LIMIT: FailurePolicy(True, 1, "rate limit"),
}
SUMMARY_BY_CODE = {"timeout": "no answer in time", "image_failed": "the image failed"}
AUTH_COOLDOWN, BACKOFF_BASE, BACKOFF_MAX = 600.0, 1.0, 60.0  # seconds
# Those with cool-downs of a length we guess.
BACKOFF_CATEGORIES = (Category.AUTH, Category.CUT, Category.NETWORK, Category.SERVER)
# Those whose cause may be one client's request, such as one that crashes the upstream.
OF_ONE_REQUEST = (Category.AUTH, Category.CUT, Category.SERVER)
KEY_TRUST = 300.0  # seconds after a success during which one rejection doesn't prove a key bad
RECHECK = 600.0  # seconds of a cool-down after which a single request probes the upstream
MAX_MODEL_COOLDOWNS = 256  # cool-downs of single models per controller


class CoolDown:
    """Consecutive failures of one category; ``until`` is the end by the pool's clock."""

    until, failures, failed_at = 0.0, 0, -math.inf
    recheck_at = math.inf
    asks_upstream = True  # it may report when the limit is over

    def record_failure(self, now: float, started: float, after: int, seconds: float | None) -> None:
        """Count a failure; at ``after`` failures cool down for ``seconds`` or back off."""
        if started >= self.failed_at:
            self.failed_at = now
            self.failures += 1
        if self.failures >= after:
            back_off = min(BACKOFF_BASE * 2 ** min(self.failures - after, 16), BACKOFF_MAX)
            self.until = max(self.until, now + (seconds or back_off))
            self.recheck_at = now + RECHECK


# Models to offer, all names in a list (those known before if reading failed), and the error.
ModelList = tuple[list[dict[str, Any]], Optional[frozenset[str]], Optional[APIError]]


class Upstream:
    """A controller in the pool, its counters and cool-downs. Under the pool's lock.

    The rules of cool-downs:

    * Each is of one category of failure, and of one model or (the model "") the whole controller.
    * It begins after as many consecutive failures as FAILURE_POLICY says. Failures of concurrent
      attempts, those that started before the last counted one, count once.
    * It lasts for AUTH_COOLDOWN, for the upstream's Retry-After, or else for BACKOFF_BASE, doubled
      with each further failure up to BACKOFF_MAX. It is only ever extended.
    * A success ends those of the controller and of its model, unless they failed after it started.
    * A key that has served a request within KEY_TRUST seconds cools down after two rejections in a
      row: the first could be due to that one request.
    * After RECHECK seconds of a long cool-down one request is let through, as the limit may have
      been that of one request, or the account topped up. An upstream that reports whether its
      limit is over is asked for that instead.
    * An only candidate skips back-off and obeys rate limits only, as in nginx.
    * If all candidates cool down for longer than a call may wait, one is used whose cool-downs are
      OF_ONE_REQUEST.
    """

    # fmt: off
    INHERITED = ("served", "failed", "outcomes", "cooldown_count", "known_models", "cooldowns",
                 "served_at", "last_error", "last_error_at")
    # fmt: on

    def __init__(self, controller: Controller, previous: Upstream | None = None) -> None:
        self.controller, self.options, self.name = controller, controller.options, controller.name
        adapts = self.options.tools in ("prompt", "refuse")
        self.adapted = ToolAdapter(controller) if adapts else controller
        self.current_weight = 0.0  # of smooth weighted round robin
        self.in_flight = self.served = self.failed = self.cooldown_count = 0
        self.outcomes: dict[str, int] = defaultdict(int)  # attempts by "success" or a category
        self.cooldowns: dict[tuple[Category, str], CoolDown] = {}  # by (category, model)
        self.served_at = -math.inf  # the last success
        self.last_error, self.last_error_at = "", 0.0  # the latter by time.time()
        self.logged_exceptions: set[tuple[Any, ...]] = set()  # (type, file, line) with a traceback
        self.known_models: frozenset[str] | None = None  # its model list; None: not read yet
        if previous and previous.account() == self.account():
            for name in self.INHERITED:
                setattr(self, name, getattr(previous, name))
            controller.take_over(previous.controller)

    def account(self) -> tuple[Any, ...]:
        """Settings of its address and account; a change of one voids state and cool-downs."""
        options, settings = self.options, self.controller.settings
        upstream = options.type, options.base_url, options.api_key, options.cookie, options.headers
        return (*upstream, options.proxy, settings.user_agent, settings.ca_file)

    def serves(self, model: str) -> bool | None:
        """Whether it offers the model: True, False, or None if unknown (worth a try)."""
        if model in self.options.model_map or not model:
            return True
        if self.options.models:
            return model_allowed(self.options.models, model)
        return True if self.known_models is None or model in self.known_models else None

    def has_capacity(self) -> bool:
        return not self.options.max_concurrency or self.in_flight < self.options.max_concurrency

    def record_result(
        self, error: APIError | None, now: float, started: float, model: str = ""
    ) -> None:
        """Record the success (None) or failure of an attempt that started at ``started``."""
        self.outcomes["success" if error is None else error.category.value] += 1
        if error is None:
            self.served += 1
            self.served_at = now
            for key, cooldown in self._applicable(model).items():
                if cooldown.failed_at <= started:  # the success disproves it
                    del self.cooldowns[key]
            return
        category = error.category
        if category is Category.SERVER and error.retry_after:
            category = Category.RATE_LIMIT
        _, after, summary = FAILURE_POLICY[category]
        if after is None:
            return
        self.failed += 1
        summary = error.reason or SUMMARY_BY_CODE.get(error.code or "", summary)
        self.last_error, self.last_error_at = f"{error.status} {summary}", time.time()
        if category is Category.AUTH and now - self.served_at < KEY_TRUST:
            after = 2
        was_cooling_down = self.available_at() > now
        fixed = {Category.AUTH: AUTH_COOLDOWN, Category.RATE_LIMIT: error.retry_after}
        cooldown = self._cooldown(category, model if error.cooldown_scope == "model" else "")
        cooldown.record_failure(now, started, after, fixed.get(category))
        self.cooldown_count += not was_cooling_down and self.available_at() > now

    def _cooldown(self, category: Category, model: str) -> CoolDown:
        """The cool-down of a category and a model ("": the controller), made if needed."""
        key = category, self.controller.upstream_model(model)
        if key not in self.cooldowns:
            # Clients choose the models' names: without a bound they could fill the memory.
            of_models = [key for key in self.cooldowns if key[1]]
            if model and len(of_models) >= MAX_MODEL_COOLDOWNS:
                del self.cooldowns[min(of_models, key=lambda other: self.cooldowns[other].until)]
            self.cooldowns[key] = CoolDown()
        return self.cooldowns[key]

    def _applicable(
        self, model: str, ignored: tuple[Category, ...] = ()
    ) -> dict[tuple[Category, str], CoolDown]:
        """The cool-downs that apply to a model, except for the ignored categories."""
        if not self.cooldowns:
            return {}
        scopes = ("", self.controller.upstream_model(model))
        items = self.cooldowns.items()
        return {key: each for key, each in items if key[1] in scopes and key[0] not in ignored}

    def available_at(self, model: str = "", ignored: tuple[Category, ...] = ()) -> float:
        """End of the cool-downs for a model ("": for all), by the pool's clock; 0 if none."""
        applicable = self._applicable(model, ignored).values()
        return max((cooldown.until for cooldown in applicable), default=0.0)

    def recheck(self, model: str, ignored: tuple[Category, ...], now: float) -> bool:
        """Whether to probe it despite a cool-down; True at most once in RECHECK seconds."""
        applicable = self._applicable(model, ignored).values()
        pending = [cooldown for cooldown in applicable if cooldown.until > now]
        if not pending or any(cooldown.recheck_at > now for cooldown in pending):
            return False
        for cooldown in pending:
            cooldown.recheck_at = now + RECHECK
        return True

    def due_limit(self, now: float) -> CoolDown | None:
        """The rate limit to ask about now; at most once in RECHECK seconds."""
        limit = self.cooldowns.get((Category.RATE_LIMIT, ""))
        if limit and limit.asks_upstream and limit.until > now >= limit.recheck_at:
            limit.recheck_at = now + RECHECK
            return limit
        return None

    def metrics(self, now: float) -> dict[tuple[str, ...], float]:
        """Return its metrics, {(name, label, ...): number} without its own label."""
        rest = self.available_at() - now
        outcomes = self.outcomes.copy()
        return {
            ("akashproxy_controller_rests_total",): self.cooldown_count,
            ("akashproxy_controller_resting",): int(rest > 0),
            ("akashproxy_controller_rest_seconds",): max(0.0, round(rest, 3)),
            **{("akashproxy_upstream_requests_total", name): outcomes[name] for name in outcomes},
            **{(name,): value for name, value in self.controller.metrics().items()},
        }

    def log_exception(self, exception: Exception) -> APIError:
        """Return its APIError; log a bug, with its traceback once per line of code."""
        error = controller_error(exception, self.name)
        if error.bug is None:
            return error
        *_, (frame, line) = traceback.walk_tb(error.bug.__traceback__)
        location = type(error.bug), frame.f_code.co_filename, line
        log.error(
            "%s: unexpected error: %s: %s",
            self.name,
            type(error.bug).__name__,
            str(error.bug)[:200],
            exc_info=None if location in self.logged_exceptions else error.bug,
        )
        self.logged_exceptions.add(location)
        return error

    def list_models(self) -> ModelList:
        """Read its model list. Models that the configuration names are always included."""
        by_name: dict[str, dict[str, Any]] = {}
        names, error = self.known_models, None
        try:
            by_name = {model["id"]: model for model in self.controller.models()}
            names = frozenset(by_name)
        except Exception as failure:
            error = self.log_exception(failure)
        patterns = self.options.models
        by_id = {name: by_name[name] for name in by_name if model_allowed(patterns, name)}
        targets = self.options.model_map
        for name in [*targets, *(name for name in patterns if not _WILDCARD.search(name))]:
            model = {"id": name, "object": "model", "created": 0, "owned_by": self.name}
            entry = by_name.get(targets.get(name, name), {})
            by_id.setdefault(name, with_context_length(model, entry))
        mark = {"tools": "prompt"} if self.options.tools == "prompt" else {}
        return [{**model, **mark} for model in by_id.values()], names, error


_WILDCARD = re.compile(r"[*?\[]")


def model_allowed(patterns: tuple[str, ...], model: str) -> bool:
    """Whether a model matches one of the patterns; no patterns allow all.

    An empty name matches none, as the upstream could use any model.
    """
    matches = (fnmatch.fnmatchcase(model, pattern) for pattern in patterns)
    return not patterns or model != "" and any(matches)


class Waiter:
    """A call that needs an upstream for its next attempt, and its entry in the queue.

    Any thread, under the pool's lock. ``known`` are the upstreams that offer the model and support
    the call, ``candidates`` those of them that were not tried yet; their cool-downs of the
    categories ``ignored`` don't count. ``upstream`` is the one that it has been assigned, where it
    is counted as in flight.
    """

    def __init__(self, exchange: Exchange, upstreams: list[Upstream], deadline: float) -> None:
        self.exchange, self.deadline = exchange, deadline
        self.known = [up for up in upstreams if up not in exchange.unsupported]
        self.candidates = [up for up in self.known if up not in exchange.tried]
        is_only = len(self.known) == 1 and not exchange.other_models
        self.ignored = BACKOFF_CATEGORIES if is_only else ()
        self.upstream: Upstream | None = None
        self.key: tuple[Any, ...] = ()  # calls with the same key become ready at the same time

    def available_at(self, upstreams: list[Upstream], now: float) -> float:
        """The time from ``now`` on when the first of the upstreams' cool-downs ends."""
        model = self.exchange.call.model
        ends = (upstream.available_at(model, self.ignored) for upstream in upstreams)
        return max(min(ends, default=now), now)

    def may_wait(self, now: float) -> bool:
        """Whether a cool-down ends by the deadline."""
        return now < self.deadline >= self.available_at(self.candidates, now)

    def error(self, now: float) -> APIError:
        """The error of the call if no upstream can serve it now.

        Without candidates it is the most informative one of the attempts; else 429 if only rate
        limits keep the upstreams from serving, and 503 otherwise.
        """
        model, errors = self.exchange.call.model, self.exchange.errors
        delay = max(self.available_at(self.known, now) - now, 1.0)
        error = most_informative(errors) if errors else model_not_found(model)
        if not self.candidates:
            if error.category is Category.RATE_LIMIT:
                error.retry_after = delay
            return error
        limited = any(error.category is Category.RATE_LIMIT for error in errors) or all(
            upstream.available_at(model, BACKOFF_CATEGORIES) > now
            for upstream in self.candidates
            if upstream.available_at(model) > now
        )
        cause = f" The last error: {error.message}" if errors else ""
        return APIError(
            429 if limited else 503,
            f"All controllers for this model are cooling down or busy.{cause}",
            code="rate_limit_exceeded" if limited else "upstream_error",
            retry_after=delay,
        )

    def set(self) -> None:
        """Resume a cancelled call; the method of threading.Event that cancel() uses."""
        with self.exchange.pool.lock:
            self.exchange.pool.queue.resume(self)


def most_informative(errors: list[APIError]) -> APIError:
    """The first error of the last category."""
    return max(errors, key=lambda error: list(Category).index(error.category))


class CallQueue:
    """First-in first-out queue of calls, none of which blocks a thread.

    Any thread, under the pool's lock. Calls with the same key share a line, and only the first of
    each line is examined: to examine every call at each release would take quadratic time.
    """

    def __init__(self) -> None:
        self.lines: dict[tuple[Any, ...], OrderedDict[Waiter, None]] = {}

    def add(self, waiter: Waiter) -> None:
        of_models = any(model for up in waiter.candidates for _, model in up.cooldowns)
        model = waiter.exchange.call.model if of_models else ""
        waiter.key = (model, waiter.ignored, *map(id, waiter.candidates))
        self.lines.setdefault(waiter.key, OrderedDict())[waiter] = None

    def remove(self, waiter: Waiter) -> bool:
        """Remove a call; False if it isn't in the queue any more."""
        line = self.lines.get(waiter.key)
        if line is None or waiter not in line:
            return False
        del line[waiter]
        if not line:
            del self.lines[waiter.key]
        return True

    def resume(self, waiter: Waiter, upstream: Upstream | None = None) -> None:
        """Remove a call from the queue and resume it; no-op if it was removed before."""
        if self.remove(waiter):
            waiter.upstream = upstream
            if upstream is not None:
                upstream.in_flight += 1
            waiter.exchange.resume()

    def __len__(self) -> int:
        """Return the number of queued calls. Any thread, also without the lock."""
        return sum(map(len, list(self.lines.values())))


def make_upstreams(settings: Settings, previous: Pool | None) -> list[Upstream]:
    """An upstream for each controller; those whose settings are unchanged are reused."""
    known = {upstream.name: upstream for upstream in previous.upstreams} if previous else {}
    reusable = previous is not None and previous.settings == dataclasses.replace(
        settings, controllers=previous.settings.controllers, keys=previous.settings.keys
    )
    upstreams = []
    for options in settings.pool():
        upstream = known.get(options.name)
        if upstream is None or not reusable or upstream.options != options:
            controller = CONTROLLERS[options.type](options, settings)
            upstream = Upstream(controller, upstream)
        upstreams.append(upstream)
    return upstreams


def enforce_deadlines() -> None:
    """Cancel overdue attempts in a process without an event loop. Never returns."""
    while True:
        time.sleep(0.25)
        CancelScope.cancel_overdue(time.monotonic())


def ask_upstream(upstream: Upstream) -> tuple[bool, str]:
    """Ask for models and login: whether both are right, and a sentence on the state."""
    started_at = time.monotonic()
    _, names, error = upstream.list_models()
    login_problem = "" if error else upstream.controller.login_problem()
    seconds = time.monotonic() - started_at
    if error is None:
        key = "key accepted" if upstream.options.api_key else "no key needed"
        count = len(names or ())
        state = f"reachable, {key}, {count} model{'s' if count != 1 else ''}"
        state += login_problem and f", but {login_problem}"
    elif error.category is Category.AUTH:
        state = f"reachable, key rejected: {error.message}"
    else:
        reached = "reachable, but lists no models" if error.upstream_status else "not reachable"
        state = f"{reached}: {error.reason or without_name(error.message, upstream.name)}"
    all_right = not (error or login_problem)
    return all_right, f"{upstream.name}: {state.rstrip('.')}, {seconds * 1000:.0f} ms"


def without_name(message: str, name: str) -> str:
    """An error message without the upstream's name at its beginning."""
    return message.removeprefix(f"{name}: ").removeprefix(f"{name} ")


def read_model_lists(upstreams: list[Upstream]) -> dict[Upstream, ModelList]:
    """Results of the upstreams' list_models(), called concurrently."""
    lists: dict[Upstream, ModelList] = {}

    def read(upstream: Upstream) -> None:
        lists[upstream] = upstream.list_models()

    threads = []
    for upstream in upstreams:
        thread = threading.Thread(target=read, args=(upstream,), daemon=True)
        try:
            thread.start()
            threads.append(thread)
        except RuntimeError:  # the system's limit of threads
            read(upstream)
    for thread in threads:
        thread.join()
    return lists


class Pool:
    """All upstreams: chooses one for each attempt, and keeps their models. Any thread."""

    def __init__(
        self,
        settings: Settings,
        previous: Pool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.clock = settings, clock
        self.lock: threading.Lock = previous.lock if previous else threading.Lock()
        self.queue: CallQueue = previous.queue if previous else CallQueue()
        self.upstreams: list[Upstream] = make_upstreams(settings, previous)
        self.enabled = [upstream for upstream in self.upstreams if upstream.options.weight > 0]
        choices = {"random": weighted_random, "least_busy": least_connections}
        self.choose = choices.get(settings.pool_type, weighted_round_robin)
        self.refresh_at = self.names_read_at = -math.inf
        self.model_names: frozenset[str] = frozenset()  # of all lists
        # It is always old: only concurrent callers share one.
        self.model_lists = Cache("model lists", self._read_models, clock, retry=0)
        # By model, until a list changes.
        self.candidates = functools.lru_cache(maxsize=256)(self._candidates)

    # -- the upstream of an attempt

    def resolve_alias(self, model: str) -> list[str]:
        """The models that a name stands for, to be tried in order; mostly itself.

        Names with "--" stand for the one with "/", if only that one exists.
        """
        for pattern, target in self.settings.model_aliases.items():
            if model and fnmatch.fnmatchcase(model, pattern):
                return [target] if isinstance(target, str) else list(target)
        if "--" in model:
            names, target = self.read_names(), model.replace("--", "/")
            return [target] if target in names and model not in names else [model]
        return [model]

    def read_names(self) -> frozenset[str]:
        """Names of all lists, which are read if they are not recent. Worker thread."""
        if self.clock() >= self.names_read_at + min(Cache.RETRY, self.settings.models_ttl):
            with contextlib.suppress(APIError):  # the last known ones are better than none
                self.models()
        return self.model_names

    def unknown_model(self, call: Call, error: APIError | None = None) -> APIError:
        """Add to an error the models that the client could have meant and its key may use.

        By default to the error of a model that its key may not use, without asking an upstream.
        """
        model, allowed = call.requested_model, call.allowed_models
        may_ask, error = error is not None, error or model_not_found(model)
        is_of_path = call.relay_only and model not in error.message
        if error.category is not Category.MODEL or error.param != "model" or is_of_path:
            return error
        names = sorted(self.read_names() if may_ask else self.model_names)
        names = [name for name in names if model_allowed(allowed, name)]
        names += (
            alias
            for alias in self.settings.model_aliases
            if not _WILDCARD.search(alias)
            and any(model_allowed(allowed, target) for target in self.resolve_alias(alias))
        )
        if model not in names:
            if LISTED not in error.message:
                error.message = f"{error.message.rstrip(' .')}. {LISTED}"
            near = similar_to(model, names, 3)
            error.message += f" Did you mean {near}?" if near else ""
        return error

    def acquire(self, exchange: Exchange) -> Upstream:
        """Choose the upstream for the next attempt, and count the attempt as in flight.

        Raises APIError if no upstream is left, or Queued if the call has to wait: call again after
        ``exchange.resume()``.
        """
        if len(self.upstreams) > 1:
            self.refresh_models_async()
        with self.lock:
            now, waiter = self.clock(), exchange.waiter
            if waiter is None:
                upstreams = self.candidates(exchange.call.model)
                waiter = Waiter(exchange, upstreams, now + self.settings.max_wait)
            elif exchange.cancellation.reason:
                raise exchange.cancellation.reason  # close() releases the assigned upstream
            exchange.set_waiter(None)
            if waiter.upstream is not None:
                return waiter.upstream
            if self.queue.lines and any(up.has_capacity() for up in waiter.candidates):
                self._resume_ready(now)  # queued calls go first
            upstream = self._pick(waiter, now) or self._enqueue(waiter, now)
            upstream.in_flight += 1
            return upstream

    def _pick(
        self, waiter: Waiter, now: float, also_ignored: tuple[Category, ...] = ()
    ) -> Upstream | None:
        """The upstream to use now: an available one, else one that is due for a recheck."""
        call, ignored = waiter.exchange.call, waiter.ignored + also_ignored
        free = [up for up in waiter.candidates if up.has_capacity()]
        ready = [
            up for up in free if not up.cooldowns or up.available_at(call.model, ignored) <= now
        ]
        if not ready:
            return next((up for up in free if up.recheck(call.model, ignored, now)), None)
        if len(ready) == 1:
            return ready[0]
        if call.preferred:
            ready = [up for up in ready if up.name == call.preferred] or ready
        priority = min(up.options.priority for up in ready)
        ready = [up for up in ready if up.options.priority == priority]
        if waiter.exchange.conversation:
            return rendezvous(ready, waiter.exchange.conversation)
        return self.choose(ready)

    def _enqueue(self, waiter: Waiter, now: float) -> Upstream:
        """Queue a call: raises Queued, or an error if waiting is useless.

        Waiting is useless if no upstream will be available by the deadline. Then one with a
        cool-down OF_ONE_REQUEST is returned, if there is any: either it serves the call, so that
        one client's request can't block the others, or its error names the cause.
        """
        exchange = waiter.exchange
        if not waiter.candidates or exchange.other_models:
            raise waiter.error(now)
        if not waiter.may_wait(now):
            upstream = self._pick(waiter, now, also_ignored=OF_ONE_REQUEST)
            if upstream is None:
                raise waiter.error(now)
            return upstream
        exchange.set_waiter(waiter)
        # Race: another thread cancels and finds no wakeup to set, then we store wakeup. Without a
        # second look the call would never be resumed.
        if exchange.cancellation.reason:
            raise exchange.cancellation.reason
        self.queue.add(waiter)
        raise Queued

    def _resume_ready(self, now: float, limit: float = math.inf) -> int:
        """Resume up to ``limit`` ready calls, oldest first; returns their number.

        A call is ready if there is an upstream for it, or none will be available by its deadline.
        """
        resumed = 0
        for line in sorted(self.queue.lines.values(), key=lambda line: next(iter(line)).deadline):
            while line and resumed < limit:
                waiter = next(iter(line))
                upstream = self._pick(waiter, now)
                if upstream is None and waiter.may_wait(now):
                    break
                self.queue.resume(waiter, upstream)
                resumed += 1
        return resumed

    def resume_waiters(self, limit: int) -> bool:
        """Resume up to ``limit`` ready calls; True if there may be more."""
        with self.lock:
            return self._resume_ready(self.clock(), limit) == limit

    def leave_queue(self, waiter: Waiter) -> None:
        """Remove a call that has ended, and release an upstream assigned to it."""
        with self.lock:
            self.queue.remove(waiter)
        if waiter.upstream is not None:
            self.release(waiter.upstream, None, False, 0.0)

    def release(
        self,
        upstream: Upstream,
        error: APIError | None,
        committed: bool,
        started: float,
        model: str = "",
    ) -> None:
        """End an attempt, and record its result unless it was given up before any."""
        with self.lock:
            now = self.clock()
            upstream.in_flight -= 1
            if error is not None or committed:
                upstream.record_result(error, now, started, model)
            if self.queue.lines:
                self._resume_ready(now)

    def _candidates(self, model: str) -> list[Upstream]:
        """Upstreams that are known to offer a model, else those that may."""
        sure = [upstream for upstream in self.enabled if upstream.serves(model)]
        return sure or [upstream for upstream in self.enabled if upstream.serves(model) is None]

    def support_error(self, upstream: Upstream, call: Call) -> APIError | None:
        """The reason why a controller doesn't support a call; None if it does."""
        try:
            error = upstream.adapted.check_support(call)
        except Exception as bug:
            error = upstream.log_exception(bug)
            with self.lock:
                upstream.record_result(error, self.clock(), self.clock())
            return error
        if error:
            error.category = Category.UNSUPPORTED  # another controller may support the call
        return error

    # -- models, images and status

    def refresh_models_async(self) -> None:
        """Refresh the model lists in a thread if they are due."""
        now = self.clock()
        if now >= self.refresh_at:
            self.refresh_at = now + Cache.RETRY  # in case that it fails
            start_thread(self.read_names, "akashproxy models")

    def models(self) -> list[dict[str, Any]]:
        """The union of all model lists, each model once. Raises APIError if it is empty.

        While a caller reads them, others get the last union, or wait for the first one.
        """
        return self.model_lists.get()

    def _read_models(self) -> tuple[list[dict[str, Any]], float]:
        lists = read_model_lists(self.enabled)
        union: dict[str, dict[str, Any]] = {}
        with self.lock:  # all at once, or the first list would attract all requests meanwhile
            for upstream in self.enabled:
                models, upstream.known_models, _ = lists.get(upstream, ([], None, None))
                for model in models:
                    first = union.setdefault(model["id"], model)
                    if CONTEXT_FIELDS[0] not in first:
                        union[model["id"]] = with_context_length(first, model)
            self.candidates.cache_clear()
        self.model_names, self.names_read_at = frozenset(union), self.clock()
        incomplete = any(upstream.known_models is None for upstream in self.upstreams)
        seconds = Cache.RETRY if incomplete else self.settings.models_ttl
        self.refresh_at = self.names_read_at + seconds
        if union:
            return list(union.values()), 0
        errors = [error for _, _, error in lists.values() if error]
        if len(errors) == 1:
            raise errors[0]
        message = "No controller lists its models at the moment."
        raise APIError(503, message, retry_after=Cache.RETRY)

    def image(self, name: str, scope: CancelScope) -> UpstreamResponse:
        """An image from the first controller that has it. Raises APIError if none does."""
        error = APIError(404, f"The image {name!r} does not exist.", code="not_found")
        for upstream in self.upstreams:
            try:
                return upstream.controller.image(name, scope)
            except Exception as exception:
                failure = upstream.log_exception(exception)
                error = failure if failure.status != 404 else error
        raise error

    def __str__(self) -> str:
        return ", ".join(
            f"{upstream.name} ({upstream.options.base_url or upstream.options.type}"
            f"{upstream.options.proxy and ', proxy '}{without_password(upstream.options.proxy)})"
            for upstream in self.upstreams
        )

    def status(self) -> list[dict[str, Any]]:
        """The controllers in /status."""
        with self.lock:
            now = self.clock()
            return [
                {
                    "name": upstream.name,
                    "type": upstream.options.type,
                    "weight": upstream.options.weight,
                    "priority": upstream.options.priority,
                    "models": None if upstream.known_models is None else len(upstream.known_models),
                    "in_flight": upstream.in_flight,
                    "served": upstream.served,
                    "failed": upstream.failed,
                    "rests_for_seconds": max(0, math.ceil(upstream.available_at() - now)),
                    "models_cooling_down": sum(
                        cooldown.until > now
                        for (_, model), cooldown in upstream.cooldowns.items()
                        if model
                    ),
                    "last_error": upstream.last_error or None,
                    "last_error_at": utc(upstream.last_error_at) if upstream.last_error else None,
                    **upstream.controller.status(),
                }
                for upstream in self.upstreams
            ]

    def on_tick(self, now: float) -> None:
        """Let controllers tidy up, and ask about long rate limits. Loop thread."""
        for upstream in self.upstreams:
            try:
                upstream.controller.on_tick(now)
            except Exception as bug:  # the queue must go on
                upstream.log_exception(bug)
            with self.lock:
                limit = upstream.due_limit(self.clock())
            if limit:
                start_thread(functools.partial(self._ask_limit, upstream, limit), "rate limit")

    def _ask_limit(self, upstream: Upstream, limit: CoolDown) -> None:
        """End a cool-down if the upstream reports that its rate limit is over."""
        is_over = None
        try:
            is_over = upstream.controller.limit_is_over()
        except Exception as error:
            upstream.log_exception(error)
        with self.lock:
            if is_over:
                log.info("%s: the rate limit is over", upstream.name)
                limit.until = 0.0
                self._resume_ready(self.clock())
            elif is_over is None:  # a request has to find out
                limit.asks_upstream, limit.recheck_at = False, self.clock()

    def close(self, keep: Iterable[Upstream] = ()) -> None:
        """Close the controllers, except for those to keep."""
        for upstream in self.upstreams:
            if upstream not in keep:
                upstream.controller.close()


# -- the choice within a tier. The caller holds the pool's lock.


def weighted_round_robin(ready: list[Upstream]) -> Upstream:
    """Smooth weighted round robin, as in nginx: 5:1:1 gives a a b a c a a."""
    for upstream in ready:
        upstream.current_weight += upstream.options.weight
    best = max(ready, key=lambda upstream: upstream.current_weight)
    best.current_weight -= sum(upstream.options.weight for upstream in ready)
    return best


def weighted_random(ready: list[Upstream]) -> Upstream:
    """A random choice by weight."""
    return random.choices(ready, [upstream.options.weight for upstream in ready])[0]


def least_connections(ready: list[Upstream]) -> Upstream:
    """The least in-flight requests per weight; round robin among equals."""
    loads = [upstream.in_flight / upstream.options.weight for upstream in ready]
    lowest = min(loads)
    return weighted_round_robin([up for up, load in zip(ready, loads) if load == lowest])


MAX_HASHED = 1 << 14  # characters at each end of a string


def conversation_of(call: Call) -> str:
    """A hash that the requests of one conversation share; "" if there are no messages.

    It is of the ``prompt_cache_key``, else of the key's name, the system text and the user's first
    message. Only the ends of long strings are hashed.
    """
    body = call.original.body or {}
    key, opening = body.get("prompt_cache_key"), [call.key_name]
    if key and isinstance(key, str):
        opening = [key]
    else:
        messages = call.body.get("messages") or body.get("messages") or body.get("input")
        for message in map(as_dict, as_list(messages)):
            if message.get("role") in ("system", "developer", "user"):
                opening.append(message_text(message))
            if message.get("role") == "user":
                break
        else:
            return ""
    ends = (f"{len(text)}:{text[:MAX_HASHED]}{text[-MAX_HASHED:]}" for text in opening)
    return _sha256("\0".join(ends))


def rendezvous(ready: list[Upstream], conversation: str) -> Upstream:
    """Weighted rendezvous hashing: only an upstream's own conversations leave it."""

    def score(upstream: Upstream) -> float:
        digest = _sha256(f"{conversation} {upstream.name}")
        point = (int(digest[:13], 16) + 0.5) / (1 << 52)  # between 0 and 1
        return -upstream.options.weight / math.log(point)

    return max(ready, key=score)


class Exchange:
    """A call and its attempts, each at another upstream.

    attempt() sends the call; ``response`` is then an EventStream or an iterable of events. On the
    first event call commit(): it ends failover. On an error before it call fail_over(),
    then attempt() again. Call close() in any case. Any thread, one at a time.
    """

    waiter: Waiter | None = None  # its entry in the pool's queue
    upstream: Any = None
    response: Any = None
    conversation = ""  # a hash, if requests of one go to the same upstream
    show_models = False  # in the route
    prepared = committed = False
    started = 0.0  # when the attempt began, by the pool's clock

    def __init__(self, pool: Pool, call: Call) -> None:
        self.pool, self.call, self.cancellation = pool, call, call.cancellation
        self.resume: Callable[[], Any] = bool  # resumes the call after Queued; any thread
        self.other_models: list[str] = []  # of an alias, to be tried when none serves this one
        # Of the current model.
        self.tried: list[Upstream] = []
        self.unsupported: list[Upstream] = []
        self.errors: list[APIError] = []
        self.model_errors: list[APIError] = []  # one of each model that no upstream served
        self.route: list[str] = []  # the attempts, such as "akash=429"

    def set_waiter(self, waiter: Waiter | None) -> None:
        """Set the entry in the queue; cancelling resumes it."""
        self.waiter = self.cancellation.wakeup = waiter

    def attempt(self) -> bool:
        """Send the call to the next upstream; True if the response is an EventStream.

        After a failure of the category RETRY the same upstream is used. Raises APIError if no
        upstream is left, Queued if the call has to wait: call again after resume().
        Worker thread.
        """
        if not self.prepared:
            self._prepare()
        while self.response is None:
            if self.upstream is None:
                self.upstream = self._acquire()
                self.started = self.pool.clock()
                self.tried.append(self.upstream)
                self.call.begin_attempt()
            try:
                self.response = self.upstream.adapted.events(self.call)
            except Exception as error:
                self.fail_over(controller_error(error, self.upstream.name))
        return isinstance(self.response, EventStream)

    def _prepare(self) -> None:
        """Resolve the model. Raises APIError if the key may use none of its targets."""
        call, self.prepared = self.call, True
        if self.pool.settings.pool_type == "affinity":
            self.conversation = conversation_of(call)
        targets = self.pool.resolve_alias(call.model)
        self.other_models = [name for name in targets if model_allowed(call.allowed_models, name)]
        self.show_models = len(self.other_models) > 1
        if not self.other_models:
            raise self.pool.unknown_model(call)
        self._use_next_model()

    def _use_next_model(self) -> None:
        """Start over with another model, and rule out the upstreams that don't support it."""
        self.call.set_model(self.other_models.pop(0))
        self.tried, self.unsupported, self.errors = [], [], []
        for upstream in self.pool.upstreams:
            error = self.pool.support_error(upstream, self.call)
            if error:
                self.unsupported.append(upstream)
                self.errors.append(error)

    def _acquire(self) -> Upstream:
        """The upstream of the next attempt; with the next model if none serves this one."""
        while True:
            try:
                return self.pool.acquire(self)
            except APIError as error:
                self._give_up_model(error)

    def _give_up_model(self, error: APIError) -> None:
        """Go on with the next model; without one raise the most informative error."""
        self.model_errors.append(error)
        if self.cancellation.reason:
            raise error
        if not self.other_models:
            error = most_informative(self.model_errors)
            if error.retry_after:  # until the first of the models is available again
                delays = (other.retry_after for other in self.model_errors)
                error.retry_after = min(filter(None, delays))
            raise self.pool.unknown_model(self.call, error)
        self._use_next_model()

    def events(self) -> Iterator[Event]:
        """Iterate over the response's events. Raises APIError if it ends without a Finish."""
        event = None
        try:
            for event in self.response:
                if not isinstance(event, EVENTS):
                    raise TypeError(f"{type(event).__name__} is not an event")
                yield event
        except Exception as error:
            raise controller_error(error, self.upstream.name) from None
        if not isinstance(event, (Finish, RawBytes)):
            raise truncated(self.upstream.name)

    def commit(self) -> None:
        """Note that the client gets this response, which ends failover."""
        self.committed = True
        self._add_to_route(200)

    def fail_over(self, error: APIError) -> None:
        """Give up the attempt. Raises the error if its category rules out another one."""
        if error.category is Category.RETRY and error.code != self.call.attempt.retry_reason:
            self._close_response()
            self.call.begin_attempt(error.code or "")
            return
        name = self.upstream.name
        if self.other_models and error.category is Category.RATE_LIMIT:
            error.cooldown_scope = "model"  # the other models may have limits of their own
        self._add_to_route(error.upstream_status or error.status)
        self._end_attempt(error)
        if not error.reason:  # else a warning has said the same
            log.info("%s: %s", name, without_name(error.message, name))
        if self.other_models and error.code == "context_length_exceeded":
            self._give_up_model(error)  # another model may have room for the conversation
        elif not FAILURE_POLICY[error.category].fail_over or self.cancellation.reason:
            raise error
        else:
            self.errors.append(error)

    def _add_to_route(self, status: int) -> None:
        """Note the status of an attempt, with the model if an alias has several."""
        model = f"({self.call.model})" if self.show_models else ""
        self.route.append(f"{self.upstream.name}{model}={status}")

    def _close_response(self) -> None:
        response, self.response = self.response, None
        if hasattr(response, "close"):
            try:
                response.close()
            except Exception as error:
                self.upstream.log_exception(error)

    def _end_attempt(self, error: APIError | None) -> None:
        """Release the upstream, with the error that ended the attempt, if any."""
        self._close_response()
        upstream, self.upstream = self.upstream, None
        if upstream:
            if error is not None:
                upstream.log_exception(error)
            self.pool.release(upstream, error, self.committed, self.started, self.call.model)

    def close(self, error: APIError | None = None) -> None:
        """End the call, with the error that ended its last attempt, if any. Idempotent."""
        self._end_attempt(error)
        if self.waiter is not None:
            self.pool.leave_queue(self.waiter)
            self.set_waiter(None)
        self.resume = bool  # breaks a reference cycle


# == 15. dialects =============================================================================
# The clients' APIs: parse a request body into a Call, encode events as bytes. Knows no upstreams
# and no sockets.


class Dialect:
    """A request in a client's format: parses it as ``call`` and encodes the response.

    A stream consists of opening_frames(), encode() for each batch of events, and error_frames() if
    it fails; any other response is response_body(). ``base_url()`` is the URL of this server as the
    client knows it.
    """

    # Methods of the subclasses
    parse: Callable[[dict[str, Any]], Call]  # a request's body; raises APIError 400
    response_body: Callable[[Answer], dict[str, Any]]  # whose events have been counted

    PREFIX = "chatcmpl-"
    LARGE_BODY = 64 << 10  # bytes
    # Fields of all dialects that become a part of the prompt.
    PROMPT = ("system", "instructions", "messages", "input", "prompt", "tools", "functions")
    text_frame: Any = None  # text_frame(JSON of a string) -> its frame, if the dialect has that
    keeps_text = False  # of a stream: an endless one must be cut before it fills the memory
    prompt_estimate: int | None = None  # tokens of the request
    output_units = 0  # token_units() of the events so far
    extra_values = 0  # JSON values in the IDs of the request's tool calls
    usage: dict[str, Any] | None = None  # of the answer, when it is complete

    def __init__(self, body: Any, base_url: Callable[[], str] = str) -> None:
        if not isinstance(body, dict):
            raise bad_request("The body must be a JSON object.")
        self.base_url = base_url
        self.id = self.PREFIX + new_id()
        self.created = int(time.time())
        self.call = self.parse(body)
        self.call.original.body = body
        self.model = self.call.model  # before aliases are resolved

    def prepare(self) -> None:
        """Compute what would block the loop later, for a large body. Worker thread."""
        if len(self.call.original.raw_body) > self.LARGE_BODY:
            self.estimate_prompt()

    def own_id(self, value: Any) -> tuple[str | None, dict[str, Any]]:
        """A past tool call's ID and what it contained. APIError if IDs contain too much."""
        call_id, extra = sent_id(value)
        self.extra_values += count_values(extra)
        if self.extra_values > MAX_JSON_VALUES:
            raise bad_request(f"The IDs of tool calls contain more than {MAX_JSON_VALUES} values.")
        return call_id, extra or {}

    def estimate_prompt(self) -> int:
        """An estimate of the request's tokens, computed once."""
        if self.prompt_estimate is None:
            body = self.call.original.body or {}
            self.prompt_estimate = estimate_tokens([body.get(name) for name in self.PROMPT])
        return self.prompt_estimate

    def count(self, event: Event) -> Event:
        """Count an event's tokens. Returns it; a Finish without usage gets an estimate."""
        if isinstance(event, Finish):
            if not event.usage:
                prompt, completion = self.estimate_prompt(), tokens_of(self.output_units)
                usage = {"prompt_tokens": prompt, "completion_tokens": completion}
                usage.update(total_tokens=prompt + completion, estimated=True)
                event = dataclasses.replace(event, usage=usage)
            self.usage = event.usage
        elif isinstance(event, RawBytes):
            self.usage = event.usage or self.usage
        else:
            name = event.name or "" if isinstance(event, ToolCall) else ""
            self.output_units += token_units(name + text_of(event))
        return event

    def opening_frames(self) -> bytes:
        """Frames before the first event."""
        return b""

    def encode(self, events: list[Event]) -> bytes:
        """Frames of a batch of events; those of Finish end the stream."""
        if len(events) == 1 and type(events[0]) is RawBytes:  # fast path of relayed streams
            self.usage = events[0].usage or self.usage
            return events[0].data
        return b"".join([self.encode_event(self.count(event)) for event in events])

    def token_frame(self, text: bytes) -> bytes:
        """The frame of a piece of text in JSON, without an event."""
        ascii_units = 3 * len(text) - 6
        self.output_units += ascii_units if text.isascii() else token_units(text[1:-1].decode())
        return self.text_frame(text)  # type: ignore[no-any-return]

    def encode_event(self, event: Event) -> bytes:
        """Frames of an event; b"" for unknown ones."""
        if isinstance(event, ImageProgress):
            queued = f", {event.position} before it" if event.position else ""
            return self.encode_event(Reasoning(f"The image is {event.status}{queued}.\n"))
        if isinstance(event, Image):
            return self.encode_event(Text(self.markdown(event)))
        return event.data if isinstance(event, RawBytes) else b""

    def error_frames(self, error: APIError) -> bytes:
        """The last frames of a stream that fails."""
        # go-openai recognizes an error by its first key.
        return b"data: " + to_json(self.error_body(error)) + b"\n\ndata: [DONE]\n\n"

    def ping_frame(self, style: str) -> bytes:
        """A keep-alive frame: a comment, or an event for clients that reject comments."""
        return b": ping\n\n" if style == "comment" else b""

    def local_response(self) -> dict[str, Any] | None:
        """The body of a response that needs no controller; None if it needs one."""
        return None

    @staticmethod
    def error_body(error: APIError) -> dict[str, Any]:
        """The body of an error response: OpenAI's fields, and those of akashchat-api-go."""
        fields = {name: getattr(error, name) for name in ("message", "type", "param", "code")}
        return {"error": fields, "code": error.status, "data": {"msg": error.legacy_message}}

    @staticmethod
    def status(error: APIError) -> int:
        """The status of an error response."""
        return error.status

    @staticmethod
    def model_object(model: dict[str, Any]) -> dict[str, Any]:
        """A model's description, from OpenAI's object."""
        return model

    @staticmethod
    def model_list(models: list[dict[str, Any]]) -> dict[str, Any]:
        """The list of models, from OpenAI's objects."""
        return {"object": "list", "data": models}

    def text(self, answer: Answer) -> str:
        """An answer's text, followed by its images as Markdown."""
        return "\n\n".join(filter(None, [answer.text, *map(self.markdown, answer.images)]))

    def markdown(self, image: Image) -> str:
        alt = re.sub(r"[\[\]\\\s]+", " ", image.prompt).strip()
        return f"![{alt}]({self.link(image)})"

    def link(self, image: Image) -> str:
        return f"{self.base_url()}/images/{image.name}" if image.name else image.url


def required_field(body: dict[str, Any], name: str, expected: Any, description: str) -> Any:
    """A field's value. Raises APIError 400 if it is missing, empty or of another type."""
    value = body.get(name)
    if value is None:
        raise bad_request(f"{name!r} is missing.", name)
    if not isinstance(value, expected):
        raise bad_request(f"{name!r} must be {description}.", name)
    if not value:
        raise bad_request(f"{name!r} must not be empty.", name)
    return value


def boolean_field(body: dict[str, Any], name: str) -> bool:
    """A Boolean field's value, False if missing. Raises APIError 400 for other types."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name!r} must be true or false.", name)
    return bool(value)


class ChatCompletions(Dialect):
    """POST /v1/chat/completions, OpenAI's API."""

    OBJECT, CHUNK = "chat.completion", "chat.completion.chunk"
    LAST_CHOICE = b'{"index":0,"delta":{}'  # of the last chunk, up to its finish_reason
    # Fields that events have no place for, and the value that changes nothing.
    RELAYED_ONLY: dict[str, Any] = {"n": 1, "logprobs": False, "top_logprobs": 0}

    def parse(self, body: dict[str, Any]) -> Call:
        required_field(body, "model", str, "the name of a model")
        for i, message in enumerate(required_field(body, "messages", list, "a list of messages")):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                param = f"messages[{i}]"
                raise bad_request(f"{param} must be an object with a 'role'.", param)
            if "tool_calls" in message or "tool_call_id" in message:
                self.restore_ids(message)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad_request("'stream_options' must be an object.", "stream_options")
        self.include_usage = bool(as_dict(options).get("include_usage"))
        call = Call(body, stream=boolean_field(body, "stream"))
        neutral = self.RELAYED_ONLY.items()
        call.untranslated = [name for name, value in neutral if body.get(name) not in (None, value)]
        return call

    def restore_ids(self, message: dict[str, Any]) -> None:
        """Put back what its IDs of tool calls contain, which are those of BlockDialect."""
        if EXTRA in as_str(message.get("tool_call_id")):
            message["tool_call_id"], _ = sent_id(message["tool_call_id"])
        calls = list(map(as_dict, as_list(message.get("tool_calls"))))
        calls = [call for call in calls if EXTRA in as_str(call.get("id"))]
        for call in calls:
            call["id"], extra = self.own_id(call["id"])
            call.update({**extra, **call})
        for name, value in pop_reasoning(calls).items():
            message[name] = message.get(name) or value

    def ping_frame(self, style: str) -> bytes:
        return self.opening_frames() if style == "chunk" else super().ping_frame(style)

    def opening_frames(self) -> bytes:
        head = {"id": self.id, "object": self.CHUNK, "created": self.created, "model": self.model}
        self.head = b'data: %b,"choices":[' % to_json(head)[:-1]
        self.tail = self.chunk_tail(None)
        return self.frame({"role": "assistant", "content": ""})

    def chunk_tail(self, reason: str | None) -> bytes:
        """The end of a chunk, from its finish_reason on."""
        end = b'}],"usage":null}\n\n' if self.include_usage else b"}]}\n\n"
        return b',"finish_reason":' + to_json(reason) + end

    def frame(self, delta: dict[str, Any]) -> bytes:
        return self.head + b'{"index":0,"delta":' + to_json(delta) + self.tail

    def text_frame(self, text: bytes) -> bytes:
        return b'%b{"index":0,"delta":{"content":%b}%b' % (self.head, text, self.tail)

    def encode_event(self, event: Event) -> bytes:
        if isinstance(event, Refusal):
            return self.frame({"refusal": event.text})
        if isinstance(event, Citation):
            return self.frame({"annotations": [event.annotation]})
        if isinstance(event, Text):
            return self.text_frame(to_json(event.text))
        if isinstance(event, Reasoning):
            return self.frame({"reasoning_content": event.text})
        if isinstance(event, ToolCall):
            return self.frame({"tool_calls": [{"index": event.index, **tool_call(event)}]})
        if isinstance(event, Finish):
            return self.finish_frames(event)
        return super().encode_event(event)

    def finish_frames(self, finish: Finish) -> bytes:
        last = self.head + self.LAST_CHOICE + self.chunk_tail(finish.reason)
        if self.include_usage:
            last += self.head + b'],"usage":' + to_json(finish.usage) + b"}\n\n"
        return last + b"data: [DONE]\n\n"

    def response_body(self, answer: Answer) -> dict[str, Any]:
        text, declined = self.text(answer), answer.refusal_text or None
        content = text or None if answer.tools or declined else text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": declined}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.citations:
            message["annotations"] = [each.annotation for each in answer.citations]
        if answer.tools:
            message["tool_calls"] = list(map(tool_call, answer.tools))
        body = self.body({"index": 0, "message": message, "logprobs": None}, answer)
        image = next(iter(answer.images), None)
        if image and image.job:  # the fields of akashchat-api-go
            fields = {"jobId": image.job, "prompt": image.prompt, "pic": image.url}
            body.update(code=200, data={"model": self.model, **fields})
        return body

    def body(self, choice: dict[str, Any], answer: Answer) -> dict[str, Any]:
        head = {"id": self.id, "object": self.OBJECT, "created": self.created, "model": self.model}
        choices = [{**choice, "finish_reason": answer.finish.reason}]
        return {**head, "choices": choices, "usage": answer.finish.usage}


def tool_call(event: ToolCall) -> dict[str, Any]:
    """A tool call, or a fragment of one, in OpenAI's format."""
    if event.name is None:
        return {"function": {"arguments": event.arguments}}
    function = {"name": event.name, "arguments": event.arguments}
    return {**(event.extra or {}), "id": event.id, "type": "function", "function": function}


class Completions(ChatCompletions):
    """POST /v1/completions, OpenAI's legacy API, as a chat of one message."""

    PREFIX = "cmpl-"
    OBJECT = CHUNK = "text_completion"
    LAST_CHOICE = b'{"text":"","index":0,"logprobs":null'
    RELAYED_ONLY = {"n": 1, "best_of": 1, "logprobs": None, "suffix": "", "echo": False}

    def parse(self, body: dict[str, Any]) -> Call:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if prompt in (None, "", []):
            raise bad_request("'prompt' is missing or empty.", "prompt")
        chat = {name: value for name, value in body.items() if name != "prompt"}
        call = super().parse({**chat, "messages": [{"role": "user", "content": prompt}]})
        if not isinstance(prompt, str):
            call.translation_error = bad_request("'prompt' must be a single string.", "prompt")
        return call

    def frame(self, delta: dict[str, Any]) -> bytes:
        text = delta.get("content") or delta.get("refusal")  # there are no other fields
        return self.text_frame(to_json(text)) if text else b""

    def text_frame(self, text: bytes) -> bytes:
        return b'%b{"text":%b,"index":0,"logprobs":null%b' % (self.head, text, self.tail)

    def response_body(self, answer: Answer) -> dict[str, Any]:
        text = self.text(answer) or answer.refusal_text
        return self.body({"text": text, "index": 0, "logprobs": None}, answer)


class Images(Dialect):
    """POST /v1/images/generations."""

    def parse(self, body: dict[str, Any]) -> Call:
        prompt = required_field(body, "prompt", str, "a string")
        count = number_field(body, "n", 1, integer=True, minimum=1)
        if body.get("model") is not None:
            required_field(body, "model", str, "a string")
        response_format, stream = body.get("response_format"), boolean_field(body, "stream")
        error = None
        if count > 10:
            error = bad_request("'n' must be at most 10.", "n")
        elif response_format not in (None, "url", "b64_json"):
            error = bad_request("'response_format' must be 'url' or 'b64_json'.", "response_format")
        elif stream:
            message = "Images can't be streamed here; request one through chat instead."
            error = bad_request(message, "stream")
        own = ("prompt", "n", "response_format", "stream")
        rest = {name: body[name] for name in body if body[name] is not None and name not in own}
        return Call(
            {**rest, "messages": [{"role": "user", "content": prompt}]},
            stream=stream,
            image_count=count,
            images_as_bytes=response_format == "b64_json",
            translation_error=error,
        )

    def response_body(self, answer: Answer) -> dict[str, Any]:
        data = [{**self.source(each), "revised_prompt": each.prompt} for each in answer.images]
        return {"created": self.created, "data": data}

    def source(self, image: Image) -> dict[str, Any]:
        if image.data is None:
            return {"url": self.link(image)}
        return {"b64_json": base64.b64encode(image.data).decode()}


ChatParts = list[dict[str, Any]]  # the content of a chat's message
# Blocks of text: their types, and the field with the text. "encrypted_content" stands in Codex's
# messages between agents; it is encrypted only if it begins with ENCRYPTED_PREFIX.
TEXT_FIELDS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
    "encrypted_content": "encrypted_content", "compaction": "content",
}  # fmt: skip
ENCRYPTED_PREFIX = "gAAAAA"
DATA_IMAGE = re.compile(r"!\[\]\(data:image/[\w+.-]+;base64,[\w+/=-]*\)")  # as in answers


class BlockRequest(Dialect):
    """The request's half of Messages and Responses: a chat, from messages of blocks."""

    RENAMED_PARAMS: dict[str, str] = {}  # fields with an equivalent in a chat, and its name
    KNOWN_PARAMS: tuple[str, ...] = ()  # fields that to_chat() handles; others are ignored
    FUNCTION_TYPES: tuple[Any, ...] = ()  # types of tools that are functions
    SCHEMA_KEY = ""  # their field with the JSON schema of the parameters
    to_chat: Callable[[dict[str, Any]], dict[str, Any]]  # converts all but RENAMED_PARAMS

    def __init__(self, body: Any, base_url: Callable[[], str] = str) -> None:
        self.untranslated: list[str] = []  # names of ignored fields, for a response header
        self.tool_names: dict[str, tuple[str, str | None]] = {}  # sent: (name, namespace)
        self.messages: list[dict[str, Any]] = []  # for finish_message()
        self.has_begun = False  # there are further messages of the user or the assistant
        super().__init__(body, base_url)

    def parse(self, body: dict[str, Any]) -> Call:
        model = required_field(body, "model", str, "the name of a model")
        call = Call({"model": model}, stream=boolean_field(body, "stream"))
        known = (*self.RENAMED_PARAMS, *self.KNOWN_PARAMS)
        self.untranslated += [name for name in body if name not in known]
        renamed = {new: body[name] for name, new in self.RENAMED_PARAMS.items() if name in body}
        try:
            chat = {**call.body, "stream": call.stream, **renamed, **self.to_chat(body)}
            paired = pair_tool_results(self.messages)
            chat["messages"] = list(filter(None, map(finish_message, paired)))
            call.body = {name: value for name, value in chat.items() if value not in (None, [])}
            if not chat["messages"]:
                raise bad_request("No message has any content.")
        except RecursionError:
            raise bad_request("The body is nested too deeply.") from None
        except APIError as error:  # a controller with this API may still accept the original
            call.translation_error = error
        call.untranslated = self.untranslated
        return call

    def convert_messages(self, messages: list[tuple[str, Any, Any]]) -> None:
        """Append messages, each with its key path, role and content. Raises APIError 400."""
        own = sum(role not in ("system", "developer") for _, role, _ in messages)
        self.has_begun = own > 1
        for param, role, content in messages:
            role = "system" if role == "developer" else role
            if role not in ("user", "assistant", "system"):
                words = f"{param}: {str(role)[:80]!r} is not a valid role; use user or assistant."
                raise bad_request(words, f"{param}.role")
            self.convert_message(param, role, content)

    def convert_message(self, param: str, role: str, content: Any) -> None:
        """Append a message after the tool results in it."""
        parts: ChatParts = []
        calls: list[dict[str, Any]] = []
        reasoning: list[str] = []
        for i, block in enumerate(content if isinstance(content, list) else [content]):
            fields = as_dict(block)
            block_type = fields.get("type")
            if is_call(fields):
                calls.append(self.history_call(fields))
            elif CALL_RESULT.fullmatch(str(block_type)):
                parts += self.append_tool_result(fields)
            elif block_type in ("thinking", "redacted_thinking", "reasoning"):
                texts = as_list(fields.get("content")) or as_list(fields.get("summary"))
                reasoning += [as_str(as_dict(part).get("text")) for part in texts]
                reasoning.append(as_str(fields.get("thinking")))
            elif role == "assistant" and block_type is not None and block_text(fields) is None:
                self.untranslated.append(str(block_type))
            else:
                parts += self.convert_part(block, f"{param}.content[{i}]")
        self.append_message(role, parts, calls, list(filter(None, reasoning)))

    def append_message(
        self, role: str, parts: ChatParts, calls: Sequence[Any] = (), reasoning: Sequence[str] = ()
    ) -> None:
        """Append a message, unless it is empty; finish_message() completes it.

        Reasoning, text and tool calls of the assistant that follow each other become one message.
        """
        parts = [part for part in parts if part["type"] != "text" or part["text"]]
        if not (parts or calls or reasoning):
            return
        last: dict[str, Any] = self.messages[-1] if self.messages else {"role": ""}
        is_continued = calls or last.get("calls") or not last.get("content")
        if role != "assistant" or last["role"] != role or not is_continued:
            last = {"role": role, "content": [], "calls": [], "reasoning": []}
            self.messages.append(last)
        for name, values in (("content", parts), ("calls", calls), ("reasoning", reasoning)):
            last[name].extend(values)

    def append_tool_result(self, block: dict[str, Any]) -> ChatParts:
        """Append a tool's result as text; returns its images, for a message of the user."""
        result = (block[name] for name in ("content", "output", "tools") if name in block)
        parts = self.convert_content(next(result, None))
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        failed = block.get("is_error") is True or block.get("status") == "failed"
        if failed and not text.lower().startswith("error"):
            text = f"Error: {text or 'the tool failed.'}"
        call_id, _ = sent_id(block.get("tool_use_id", block.get("call_id")))
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        return [part for part in parts if part["type"] != "text"]

    def history_call(self, block: dict[str, Any]) -> dict[str, Any]:
        """A past tool call in OpenAI's format. APIError if IDs contain too much."""
        call_id, extra = self.own_id(block.get("call_id", block.get("id")))
        given = (block[name] for name in CALL_ARGUMENTS if name in block)
        arguments, call_type = next(given, None), str(block.get("type"))
        if call_type == "custom_tool_call":
            arguments = {"input": arguments}
        if not isinstance(arguments, str):
            arguments = _encode(as_dict(arguments))
        elif not isinstance(json_or_none(arguments.encode("utf-8", "replace")), dict):
            arguments = _encode(call_input(arguments))  # many upstreams parse it
        name = block.get("name", call_type.removesuffix("_call"))
        name = self.sent_name(name, block.get("namespace"))
        return tool_call(ToolCall(0, arguments, call_id, name, extra))

    def convert_content(self, content: Any, param: str = "") -> ChatParts:
        """Convert a string, a block or a list of blocks into parts of a chat message."""
        if not isinstance(content, list):
            return self.convert_part(content, param)
        parts: ChatParts = []
        for i, block in enumerate(content):
            parts += self.convert_part(block, param and f"{param}[{i}]")
        return parts

    def convert_part(self, block: Any, param: str) -> ChatParts:
        """Convert a block of either format into parts of a chat message.

        Other blocks become a note to the model, or JSON in a tool's result, where ``param`` is "".
        In the first message of a conversation they raise APIError 400; later, that would end the
        conversation for good.
        """
        fields = {"type": "text", "text": block} if isinstance(block, str) else as_dict(block)
        block_type, source = fields.get("type"), as_dict(fields.get("source"))
        text = block_text(fields)
        if text is not None:
            text = DATA_IMAGE.sub("[An image is left out.]", text)
            return [{"type": "text", "text": text}]
        if block_type in ("image", "input_image", "computer_screenshot", "image_url"):
            url = fields.get("image_url") or source.get("url")
            url = as_dict(url).get("url", url)
            if source.get("type") == "base64":
                url = f"data:{source.get('media_type')};base64,{source.get('data')}"
            if isinstance(url, str):
                detail = fields.get("detail")
                image = {"url": url, **({"detail": detail} if detail in ("low", "high") else {})}
                return [{"type": "image_url", "image_url": image}]
        if block_type == "search_result" or source.get("type") in ("text", "content"):
            about = map(as_str, map(fields.get, ("title", "source", "context")))
            content = fields.get("content") or source.get("data") or source.get("content")
            content = content if isinstance(content, list) else [content or ""]
            return self.convert_content([*filter(None, about), *content], param)
        if block is None and (self.has_begun or not param):
            return []
        if not param or self.has_begun and block_type:
            left_out = f"[A block of type {str(block_type)[:80]!r} is left out.]"
            text = file_note(fields) or (left_out if param else _encode(block))
            return [{"type": "text", "text": text}]
        words = f"{str(block_type or block)[:80]!r} can't be converted for a chat model."
        raise bad_request(f"{param}: {words}", param)

    @staticmethod
    def response_format(format_spec: dict[str, Any]) -> dict[str, Any] | None:
        """Convert the format of an answer, as Responses names it."""
        schema = {name: value for name, value in format_spec.items() if value is not None}
        kind = schema.pop("type", "text")
        schema_field = {"json_schema": schema} if schema else {}
        return None if kind == "text" else {"type": kind, **schema_field}

    def convert_tools(
        self, tools: Any, param: str = "tools", space: str | None = None
    ) -> list[dict[str, Any]]:
        """Convert the tools that are functions, also those of a namespace."""
        functions: list[dict[str, Any]] = []
        if tools is not None and not isinstance(tools, list):
            raise bad_request(f"{param!r} must be a list.", param)
        for i, tool in enumerate(map(as_dict, tools or [])):
            if tool.get("type") in self.FUNCTION_TYPES:
                functions.append(self.convert_tool(tool, f"{param}[{i}]", space))
            elif tool.get("type") == "namespace" and tool.get("tools"):
                inner = f"{param}[{i}].tools"
                functions += self.convert_tools(tool["tools"], inner, str(tool.get("name")))
            else:
                self.untranslated.append(str(tool.get("type")))
        return functions

    def convert_tool(self, tool: dict[str, Any], param: str, space: str | None) -> dict[str, Any]:
        """Convert a function. OpenAI wants the schema of an object with ``properties``."""
        name = required_field(tool, "name", str, f"a string in {param}")
        same = {key: tool[key] for key in ("description", "strict") if tool.get(key) is not None}
        schema = as_dict(tool.get(self.SCHEMA_KEY)).items()
        given = {name: value for name, value in schema if value is not None and name != "type"}
        parameters = {"type": "object", "properties": {}, **given}
        function = {"name": self.sent_name(name, space), **same, "parameters": parameters}
        return {"type": "function", "function": function}

    def sent_name(self, name: Any, space: Any = None) -> str:
        """A function's name as OpenAI accepts it, with its namespace; see tool_names."""
        target = (str(name), space if isinstance(space, str) and space else None)
        sent = "__".join([target[1].rstrip("_"), target[0]]) if target[1] else target[0]
        if not TOOL_NAME.fullmatch(sent) or self.tool_names.setdefault(sent, target) != target:
            sent = re.sub("[^A-Za-z0-9_-]", "_", sent[:55]) + "_" + _sha256(repr(target))[:8]
            self.tool_names[sent] = target
        return sent

    def chosen_tool(self, choice: dict[str, Any], functions: Any) -> dict[str, Any] | None:
        """A ``tool_choice`` of one function; None if it is not among those that are sent."""
        sent = self.sent_name(choice.get("name"), choice.get("namespace"))
        if all(tool["function"]["name"] != sent for tool in functions):
            self.untranslated.append("tool_choice")
            return None
        return {"type": "function", "function": {"name": sent}}


def block_text(block: dict[str, Any]) -> str | None:
    """The text of a block of text; None for other blocks, and if it is encrypted."""
    text = block.get(TEXT_FIELDS.get(as_str(block.get("type")), ""))
    is_encrypted = str(block.get("encrypted_content")).startswith(ENCRYPTED_PREFIX)
    return text if isinstance(text, str) and not is_encrypted else None


class BlockDialect(BlockRequest):
    """The response's half of Messages and Responses: blocks.

    Blocks never interleave, but fragments of an upstream's tool calls may: what arrives while a
    call's arguments are incomplete is deferred until the end.
    """

    keeps_text = True
    MAX_KEPT_REASONING = 1000  # characters
    BLOCKS_END_WITH_TEXT = True  # stop_block() repeats the block's text

    def __init__(self, body: Any, base_url: Callable[[], str] = str) -> None:
        self.show_reasoning = True
        self.returns_reasoning = False  # the client sends back what it gets, with a signature
        self.kept_reasoning = ""  # the beginning of what it can't send back
        self.open_block: Any = None  # its block_key()
        self.open_text: list[str] = []
        self.block_index = 0  # of the open or next block
        self.tool_blocks: set[Any] = set()  # keys of all blocks that are tool calls
        self.deferred: list[BlockEvent] = []
        super().__init__(body, base_url)

    # Methods of the subclasses that return the frames
    start_block: Callable[[BlockEvent], bytes]  # that open a block; the event has no text yet
    delta: Callable[[str], bytes]  # of a piece of the open block's text
    stop_block: Callable[[str], bytes]  # that close the open block, whose text is complete
    finish_frames: Callable[[Finish], bytes]  # that end the stream

    def encode_event(self, event: Event) -> bytes:
        if isinstance(event, Reasoning):
            self.keep_reasoning(event.text)
            if not self.show_reasoning:
                return b""
        if isinstance(event, (Text, Reasoning, ToolCall)):
            return self.encode_block(event)
        if isinstance(event, Finish):
            return self.flush_deferred() + self.close() + self.finish_frames(event)
        return super().encode_event(event)

    def encode_block(self, event: BlockEvent, may_defer: bool = True) -> bytes:
        """Frames of an event that belongs to a block; b"" if it is deferred."""
        frames, block = b"", self.block_key(event)
        if block != self.open_block:
            if block in self.tool_blocks:  # white space after the end of the arguments
                return b""
            if may_defer and (self.deferred or self.has_partial_arguments()):
                self.deferred.append(event)
                return b""
            frames = self.close()
            self.open_block = block
            start = with_text(event, "")
            if isinstance(event, ToolCall):
                self.tool_blocks.add(block)
                start = self.with_id(event, "")
            frames += self.start_block(start)
        text = text_of(event)
        if not text:
            return frames
        if self.BLOCKS_END_WITH_TEXT or block in self.tool_blocks:
            self.open_text.append(text)
        return frames + self.delta(text)

    @staticmethod
    def block_key(event: Event) -> Any:
        """The block of an event: its class, and the index of a tool call."""
        return type(event), getattr(event, "index", None)

    def has_partial_arguments(self) -> bool:
        """Whether the open block is a tool call with incomplete arguments."""
        is_call = self.open_block in self.tool_blocks
        return is_call and json_or_none("".join(self.open_text).encode("utf-8", "replace")) is None

    def flush_deferred(self) -> bytes:
        """Frames of the deferred events, block by block."""
        blocks: dict[Any, list[BlockEvent]] = {}
        for event in self.deferred:
            blocks.setdefault(self.block_key(event), []).append(event)
        self.deferred = []
        events = itertools.chain.from_iterable(blocks.values())
        return b"".join(self.encode_block(event, may_defer=False) for event in events)

    def close(self) -> bytes:
        """Frames that close the open block, if there is one."""
        if self.open_block is None:
            return b""
        frames = self.stop_block("".join(self.open_text))
        self.open_block, self.open_text, self.block_index = None, [], self.block_index + 1
        return frames

    def answer_blocks(self, answer: Answer) -> list[BlockEvent]:
        """An answer as a sequence of events, one per block."""
        blocks: list[BlockEvent] = [Text(self.text(answer)), Refusal(answer.refusal_text)]
        self.keep_reasoning(answer.reasoning)
        if self.show_reasoning:
            blocks.insert(0, Reasoning(answer.reasoning))
        calls = [self.with_id(call, call.arguments) for call in answer.tools]
        return [*filter(text_of, blocks), *calls]

    def keep_reasoning(self, text: str) -> None:
        """Keep the beginning of reasoning that the client can't send back, for with_id()."""
        if not self.returns_reasoning:
            self.kept_reasoning += text[: self.MAX_KEPT_REASONING - len(self.kept_reasoning)]

    def with_id(self, call: ToolCall, arguments: str) -> ToolCall:
        """A tool call with other arguments; its ID contains what the upstream wants back.

        Those are its ``extra``, and of the first call reasoning that the client can't return:
        several upstreams reject tool calls without the reasoning that led to them. An ID that other
        upstreams would reject, such as Kimi's "functions.f:0", is contained in another one.
        """
        extra, call_id = {**(call.extra or {})}, call.id or ""
        if not CALL_ID.fullmatch(call_id):
            extra.update({"id": call_id} if 0 < len(call_id) <= MAX_CALL_ID else {})
            call_id = "call_" + new_id()
        if self.kept_reasoning:
            extra["reasoning_content"], self.kept_reasoning = self.kept_reasoning, ""
        return ToolCall(call.index, arguments, id_with_extra(call_id, extra), call.name or "")

    def client_name(self, call: ToolCall) -> tuple[str, str | None]:
        """The client's own name of a called function, and its namespace."""
        return self.tool_names.get(call.name or "", (call.name or "", None))

    @staticmethod
    def status(error: APIError) -> int:
        return 404 if error.category is Category.MODEL else error.status


# -- The history of a conversation

TOOL_LISTS = ("additional_tools", "tool_search_output")  # items
CALL_ARGUMENTS = ("arguments", "input", "action", "operation")  # fields, by the type of call


def is_call(block: dict[str, Any]) -> bool:
    """Whether a block or item is a tool call whose result the client sends.

    Responses has function_call, custom_tool_call, shell_call, computer_call and others.
    """
    block_type = str(block.get("type"))
    is_other = block_type.endswith("_call") and "call_id" in block
    return is_other or block_type in ("tool_use", "function_call")


# Types of the results of such calls.
CALL_RESULT = re.compile("tool_result|tool_search_output|.*_call_output")
TOOL_NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # OpenAI's rule
MAX_CALL_ID = 40  # characters: OpenAI's limit
CALL_ID = re.compile("[A-Za-z0-9_-]{1,%d}" % MAX_CALL_ID)  # with Anthropic's characters
NO_RESULT = "[The tool call was interrupted and has no result.]"


def pop_reasoning(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove from calls what their IDs contained of their message; returns its fields."""
    texts = [as_str(call.pop("reasoning_content", None)) for call in calls]
    details = [each for call in calls for each in as_list(call.pop("reasoning_details", None))]
    fields = {"reasoning_content": "\n\n".join(filter(None, texts)), "reasoning_details": details}
    return {name: value for name, value in fields.items() if value}


def pair_tool_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the results of tool calls right behind them, as OpenAI requires.

    A result belongs to the last call before it that has its ID, else to the first one after it;
    one without an ID to the first call without a result, of the last message with calls. A call
    without a result gets NO_RESULT. A result without a call becomes text of the user.
    """
    paired: list[dict[str, Any]] = []
    results: dict[Any, dict[str, Any]] = {}  # by the ID of their call; their content is a list
    open_results: Iterator[dict[str, Any]] = iter(())  # of the last message with calls
    for message in messages:
        calls = message.get("calls", [])
        if message["role"] == "tool":
            call_id = message["tool_call_id"]
            result = results.get(call_id) if call_id else next(open_results, None)
            if result is None:  # an orphan, whose call may follow
                result = {"role": "orphan", "content": []}
                paired.append(result)
                results.update({call_id: result} if call_id else {})
            result["content"].append(message["content"])
        else:
            paired.append(message)
        for call in calls:
            call["id"] = call["id"] or f"call_{len(results)}"
            result = {"role": "tool", "tool_call_id": call["id"], "content": []}
            earlier = results.get(call["id"], result)
            if earlier["role"] == "orphan":
                result["content"], earlier["content"] = earlier["content"], []
            results[call["id"]] = result
            paired.append(result)
        if calls:
            open_results = (each for each in paired[-len(calls) :] if not each["content"])
    return paired


def finish_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message of append_message() or pair_tool_results() in OpenAI's format; or {}.

    Reasoning stays with tool calls, where models such as Kimi's and DeepSeek's require it. Their
    IDs may contain it, too.
    """
    role, parts, calls = message["role"], message["content"], message.get("calls")
    if role == "orphan":
        text = "[Result of an unknown tool call]\n" + "\n\n".join(parts)
        return {"role": "user", "content": text} if parts else {}
    if role == "tool":
        return {**message, "content": "\n\n".join(parts) if parts else NO_RESULT}
    texts = [part["text"] for part in parts if part["type"] == "text"]
    content = "\n\n".join(texts) if len(texts) == len(parts) else parts
    fields: dict[str, Any] = {"tool_calls": calls, **pop_reasoning(calls)} if calls else {}
    if calls and message["reasoning"]:
        fields["reasoning_content"] = "\n\n".join(message["reasoning"])
    return {"role": role, "content": content or None, **fields} if content or calls else {}


EXTRA = "__extra_"
MAX_EXTRA = 1 << 16  # characters


def id_with_extra(call_id: str, extra: dict[str, Any] | None) -> str:
    """Add ``extra`` of a call to its ID, the only field that all clients return."""
    if not extra:
        return call_id
    data = base64.urlsafe_b64encode(to_json(extra)).decode().rstrip("=")
    return call_id + EXTRA + data if len(data) <= MAX_EXTRA else call_id


def split_extra(value: Any) -> tuple[str | None, dict[str, Any] | None]:
    """A call's own ID, None if missing, and what id_with_extra() has added to it.

    A client may have cut it off or changed it to lower case: then only the ID is left.
    """
    call_id = str(value) if isinstance(value, (str, int)) and value != "" else None
    head, mark, data = (call_id or "").rpartition(EXTRA)
    if not mark or data[:3].lower() != "eyj":  # '{"' in base64
        return call_id, None
    extra: Any = None
    if len(data) <= MAX_EXTRA:
        with contextlib.suppress(ValueError):
            extra = from_json(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)))
    return head, as_dict(extra) or None


def sent_id(value: Any) -> tuple[str | None, dict[str, Any] | None]:
    """A call's ID as upstreams accept it, and what it contained."""
    call_id, extra = split_extra(value)
    call_id = as_str((extra or {}).pop("id", None)) or call_id
    if call_id and len(call_id) > MAX_CALL_ID:
        call_id = "call_" + _sha256(call_id)[:24]
    return call_id, extra


CALL_ID_FIELDS = ("id", "call_id", "tool_call_id", "tool_use_id")


def without_own_marks(value: Any, levels: int = 5) -> Any:
    """A request for an upstream with the client's own API, or a part of it.

    It would reject reasoning of ours, which has no valid signature and no ID that it knows, and the
    long IDs of id_with_extra(), except in a chat, which restore_ids() has changed. These stand
    within five ``levels``: in a block or call of the list in a message of the body's list.
    """
    if isinstance(value, list) and levels:
        items = (item for item in value if not is_own_reasoning(item))
        return [without_own_marks(item, levels - 1) for item in items]
    if not isinstance(value, dict) or not levels:
        return value
    long_ids = [name for name in CALL_ID_FIELDS if EXTRA in as_str(value.get(name))]
    ids = {name: split_extra(value[name])[0] for name in long_ids}
    return {**{name: without_own_marks(each, levels - 1) for name, each in value.items()}, **ids}


def is_own_reasoning(item: Any) -> bool:
    """Whether a block or item is reasoning of ours, or a message that consists of it."""
    content = as_list(as_dict(item).get("content"))
    return has_own_mark(item) or content != [] and all(map(has_own_mark, content))


def has_own_mark(block: Any) -> bool:
    """Whether a block or item is marked as reasoning of ours."""
    fields = as_dict(block)
    signatures = fields.get("signature"), fields.get("encrypted_content")
    return UNSIGNED in signatures or as_str(fields.get("id")).startswith(UNSIGNED_ID)


def count_values(value: Any) -> int:
    """The number of JSON values in a value, itself included."""
    children = value.values() if isinstance(value, dict) else value
    return 1 + (sum(map(count_values, children)) if isinstance(value, (dict, list)) else 0)


FILE_TYPES = ("document", "file", "input_file", "input_audio")
FILE_DATA = ("data", "file_data", "blob")
FILE_NAMES_AND_TYPES = ("media_type", "mime_type", "mimeType", "filename")


def file_note(block: dict[str, Any]) -> str:
    """A note to the model in place of a file; "" for a block without one."""
    strings = {key: text for _, key, text in _strings_in(block)}
    urls = [text for text in strings.values() if text.startswith("data:")]
    data = next(filter(None, [*map(strings.get, FILE_DATA), *urls]), "")
    about = " ".join(strings.get(name, "") for name in FILE_NAMES_AND_TYPES)
    if block.get("type") not in FILE_TYPES and not urls and not (data and about.strip()):
        return ""
    prefix, _, payload = data.rpartition(",")  # of a data URL
    about = (about + prefix[:100]).strip() or str(block.get("type"))
    kind = "PDF" if about == "document" or "pdf" in about.lower() else "file"
    size = f" of {len(payload) * 3 // 4 - payload[-2:].count('=')} bytes" if payload else ""
    return f"[A {kind}{size}, which this model can't read.]"


def event_frame(name: str, **fields: Any) -> bytes:
    """A server-sent event; its name is also its data's type."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **fields}))


# In place of a signature of reasoning, as there is none to check here. Many clients send reasoning
# back only if it has one.
UNSIGNED = "unsigned-by-akashproxy"
UNSIGNED_ID = "rs_unsigned_"  # prefix of the IDs of reasoning items
OWN_MARKS = (EXTRA.encode(), UNSIGNED.encode(), UNSIGNED_ID.encode())


class Messages(BlockDialect):
    """POST /v1/messages, Anthropic's API. A stream, as events and data without "type":

        message_start        {"message":{"id":"msg_1","content":[],"usage":{...},...}}
        content_block_start  {"index":0,"content_block":{"type":"text","text":""}}
        content_block_delta  {"index":0,"delta":{"type":"text_delta","text":"Hi"}}
        content_block_stop   {"index":0}
        message_delta        {"delta":{"stop_reason":"end_turn",...},"usage":{...}}
        message_stop         {}

    Text is a block "text" with "text_delta". Reasoning is "thinking" with "thinking_delta" and, at
    its end, a "signature_delta" of UNSIGNED; it is included if ``thinking`` requests it. A ToolCall
    is "tool_use" with "input_json_delta". An "error" event ends a stream that fails; "ping" may
    come anywhere.
    """

    BLOCKS_END_WITH_TEXT = False
    # fmt: off
    PREFIX = "msg_"
    RENAMED_PARAMS = {"max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p",
                      "stop_sequences": "stop"}
    KNOWN_PARAMS = ("model", "messages", "system", "stream", "tools", "tool_choice", "thinking",
                    "metadata", "output_config", "output_format")
    REFUSED = ("thread", "compaction")  # skipping these would change the answer
    DETAILED_CODES = ("thread_unsupported_request",)  # those that the SDK looks for
    FUNCTION_TYPES, SCHEMA_KEY = (None, "custom"), "input_schema"
    DELTA_TYPES = {Text: (b"text_delta", b"text"), Refusal: (b"text_delta", b"text"),
                   Reasoning: (b"thinking_delta", b"thinking"),
                   ToolCall: (b"input_json_delta", b"partial_json")}
    STOP_REASONS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
    ERROR_TYPE_BY_STATUS = {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error",
        413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
        529: "overloaded_error",
    }
    # fmt: on
    has_refusal = False

    # -- the request

    def to_chat(self, body: dict[str, Any]) -> dict[str, Any]:
        for name in self.REFUSED:
            if body.get(name):
                message = f"{name!r} can't be used for this model: send the whole conversation."
                raise bad_request(message, name, f"{name}_unsupported_request")
        thinking, config = as_dict(body.get("thinking")), as_dict(body.get("output_config"))
        self.show_reasoning = self.returns_reasoning = (
            thinking.get("type") not in (None, "disabled") and thinking.get("display") != "omitted"
        )
        tools = self.convert_tools(body.get("tools"))
        system = self.convert_content(body.get("system") or [], "system")
        self.append_message("system", list(map(without_billing_header, system)))
        sent = enumerate(required_field(body, "messages", list, "a list of messages"))
        fields = [(f"messages[{i}]", as_dict(each)) for i, each in sent]
        self.convert_messages([(i, each.get("role"), each.get("content")) for i, each in fields])
        chat: dict[str, Any] = {"user": self.user_name(body)}
        response_format = as_dict(config.get("format") or body.get("output_format"))
        if response_format.get("type") == "json_schema":
            strict = is_strict_schema(response_format.get("schema"))
            named = {**response_format, "name": "answer", "strict": strict}
            chat["response_format"] = self.response_format(named)
        self.untranslated += [f"output_config.{name}" for name in config if name != "format"]
        if "budget_tokens" in thinking:  # many models reject reasoning_effort
            self.untranslated.append("thinking.budget_tokens")
        chat["tools"] = tools or None
        if tools:
            choice = as_dict(body.get("tool_choice"))
            chat["tool_choice"] = self.convert_tool_choice(choice, tools)
            if choice.get("disable_parallel_tool_use") is True:
                chat["parallel_tool_calls"] = False
        return chat

    def user_name(self, body: dict[str, Any]) -> Any:
        """``metadata.user_id``, unless it is longer than upstreams accept."""
        name = as_dict(body.get("metadata")).get("user_id")
        if name is None or isinstance(name, str) and TOOL_NAME.fullmatch(name):
            return name
        self.untranslated.append("metadata.user_id")
        return None

    def convert_tool_choice(self, choice: dict[str, Any], tools: list[dict[str, Any]]) -> Any:
        choice_type = choice.get("type")
        if choice_type == "tool":
            return self.chosen_tool(choice, tools)
        if choice_type not in (None, "auto", "any", "none"):
            message = "'tool_choice' must be of the type auto, any, none or tool."
            raise bad_request(message, "tool_choice")
        return "required" if choice_type == "any" else choice_type

    # -- the response

    def opening_frames(self) -> bytes:
        usage = {"input_tokens": self.estimate_prompt(), "output_tokens": 0}
        return event_frame("message_start", message={**self.message_object([]), "usage": usage})

    def start_block(self, event: BlockEvent) -> bytes:
        self.head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%b","%b":' % (self.block_index, *self.DELTA_TYPES[type(event)])
        )
        block = self.content_block(event)
        return event_frame("content_block_start", index=self.block_index, content_block=block)

    def delta(self, text: str) -> bytes:
        return self.head + to_json(text) + b"}}\n\n"

    def stop_block(self, text: str) -> bytes:
        frames = b""
        if self.open_block[0] is Reasoning:
            signature = {"type": "signature_delta", "signature": UNSIGNED}
            frames = event_frame("content_block_delta", index=self.block_index, delta=signature)
        return frames + event_frame("content_block_stop", index=self.block_index)

    def finish_frames(self, finish: Finish) -> bytes:
        delta, usage = self.stop_fields(finish), self.usage_object(finish)
        return event_frame("message_delta", delta=delta, usage=usage) + event_frame("message_stop")

    def error_frames(self, error: APIError) -> bytes:
        return self.flush_deferred() + event_frame("error", **self.error_body(error))

    def ping_frame(self, style: str) -> bytes:
        return b"" if style == "off" else event_frame("ping")

    def response_body(self, answer: Answer) -> dict[str, Any]:
        message = self.message_object(list(map(self.content_block, self.answer_blocks(answer))))
        usage = self.usage_object(answer.finish)
        return {**message, **self.stop_fields(answer.finish), "usage": usage}

    def message_object(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, "stop_reason": None, "stop_sequence": None}

    def content_block(self, event: BlockEvent) -> dict[str, Any]:
        if isinstance(event, ToolCall):
            name, sent = self.client_name(event)[0], call_input(event.arguments)
            return {"type": "tool_use", "id": event.id, "name": name, "input": sent}
        if isinstance(event, Reasoning):
            signature = UNSIGNED if event.text else ""  # in a stream it follows the text
            return {"type": "thinking", "thinking": event.text, "signature": signature}
        self.has_refusal = self.has_refusal or isinstance(event, Refusal)
        return {"type": "text", "text": event.text}

    def stop_fields(self, finish: Finish) -> dict[str, Any]:
        default, sequence = "refusal" if self.has_refusal else "end_turn", finish.stop_sequence
        reason = self.STOP_REASONS.get(finish.reason, default)
        if sequence is None or sequence not in as_list(self.call.body.get("stop")):
            return {"stop_reason": reason, "stop_sequence": None}
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}

    def usage_object(self, finish: Finish) -> dict[str, int]:
        """Token counts, those of cached input apart."""
        usage = finish.usage or {}
        read = usage_detail(usage, "prompt", "cached_tokens")
        written = usage_detail(usage, "prompt", "cache_write_tokens")
        return {
            "input_tokens": usage["prompt_tokens"] - read - written,
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": written,
            "output_tokens": usage["completion_tokens"],
            **({"estimated": True} if is_estimated(usage) else {}),
        }

    @staticmethod
    def status(error: APIError) -> int:
        return 529 if error.status == 503 else BlockDialect.status(error)

    @staticmethod
    def error_body(error: APIError) -> dict[str, Any]:
        status = Messages.status(error)
        default = "api_error" if status >= 500 else "invalid_request_error"
        error_type = Messages.ERROR_TYPE_BY_STATUS.get(status, default)
        is_detailed = error.code in Messages.DETAILED_CODES
        details = {"details": {"error_code": error.code}} if is_detailed else {}
        fields = {**details, "message": overflow_message(error), "type": error_type}
        return {"type": "error", "error": fields}

    @staticmethod
    def model_object(model: dict[str, Any]) -> dict[str, Any]:
        created = model.get("created")
        seconds = min(max(created, 0), 1 << 33) if type(created) is int else 0
        names = {"type": "model", "id": model["id"], "display_name": model["id"]}
        limits = {name: model[name] for name in CONTEXT_FIELDS if name in model}
        return {**names, "lifecycle": "active", "created_at": utc(seconds), **limits}

    @staticmethod
    def model_list(models: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [model["id"] for model in models] or [None]
        data = list(map(Messages.model_object, models))
        return {"data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


def overflow_message(error: APIError) -> str:
    """An error's message; for an Overflow in words that Claude Code understands."""
    prompt, output, limit = error.overflow or (0, 0, 0)
    if error.overflow is None or error.message.startswith("prompt is too long"):
        return error.message
    if 0 < prompt < limit and output:
        sizes = f"{prompt} + {output} > {limit}, decrease input length or `max_tokens`"
        return f"input length and `max_tokens` exceed context limit: {sizes} and try again"
    known = f"{prompt} tokens > {limit} maximum" if prompt > limit > 0 else error.message
    return f"prompt is too long: {known}"


def is_strict_schema(schema: Any) -> bool:
    """Whether OpenAI accepts a schema as strict: nothing in it is optional."""
    if isinstance(schema, list):
        return all(map(is_strict_schema, schema))
    fields = as_dict(schema)
    properties, required = as_dict(fields.get("properties")), as_list(fields.get("required"))
    is_open = "properties" in fields and fields.get("additionalProperties") is not False
    if is_open or "allOf" in fields or set(properties) - set(map(str, required)):
        return False
    return all(map(is_strict_schema, fields.values()))


def without_billing_header(part: dict[str, Any]) -> dict[str, Any]:
    """A part without Claude Code's first line, which would defeat prompt caches."""
    text = part.get("text", "")
    if not text.startswith("x-anthropic-billing-header:"):
        return part
    return {**part, "text": text.partition("\n")[2].lstrip("\n")}


def call_input(arguments: str) -> dict[str, Any]:
    """A tool call's arguments as an object, {"arguments": string} if they are not one."""
    value: Any = None
    with contextlib.suppress(ValueError):
        value = from_json(arguments.strip().encode("utf-8", "replace") or b"{}")
    return value if isinstance(value, dict) else {"arguments": arguments}


def usage_detail(usage: dict[str, Any], of: str, name: str) -> int:
    """A detail of OpenAI's prompt or completion token counts; 0 if missing."""
    return count_or_none(as_dict(usage.get(of + "_tokens_details")).get(name)) or 0


class CountTokens(Messages):
    """POST /v1/messages/count_tokens: relayed if supported, else estimated."""

    def parse(self, body: dict[str, Any]) -> Call:
        model = body.get("model")
        return Call({"model": model} if isinstance(model, str) else {}, relay_only=True)

    def local_response(self) -> dict[str, Any] | None:
        return {"input_tokens": self.estimate_prompt()}


def custom_input(arguments: str) -> str:
    """The input of a custom tool in the arguments of its function: their only string."""
    values = list(call_input(arguments).values()) or [""]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else arguments


class ItemWire(NamedTuple):
    """A kind of item of Responses, and how it is streamed."""

    type: str
    id_prefix: str
    text_event: str  # with ".delta" and ".done"
    text_field: str  # of the latter
    part_index: dict[str, int] = {}  # of the item's only part
    more: dict[str, Any] = {}  # further fields of the text events
    part_event: str = ""  # with ".added" and ".done"


class Responses(BlockDialect):
    """POST /v1/responses, stateless. A stream, as event names and data without "type":

        response.created             {"response":{"id":"resp_1","output":[],...}}
        response.in_progress         {"response":{"id":"resp_1","output":[],...}}
        response.output_item.added   {"output_index":0,"item":{"id":"msg_1","content":[],...}}
        response.content_part.added  {"item_id":"msg_1","part":{"text":"",...},...}
        response.output_text.delta   {"item_id":"msg_1","content_index":0,"delta":"Hi",...}
        response.output_text.annotation.added  {"item_id":"msg_1","annotation":{...},...}
        response.output_text.done    {"item_id":"msg_1","content_index":0,"text":"Hi",...}
        response.content_part.done   {"item_id":"msg_1","part":{"text":"Hi",...},...}
        response.output_item.done    {"output_index":0,"item":{...}}
        response.completed           {"response":{...}}

    Every event also has a sequence_number. A Reasoning is an item "reasoning", with the events
    response.reasoning_summary_part.* and response.reasoning_summary_text.*; a ToolCall is an item
    "function_call", with response.function_call_arguments.*, or a "custom_tool_call". A truncated
    response ends with response.incomplete, one that fails with the events error and
    response.failed.
    """

    # fmt: off
    PREFIX = "resp_"
    RENAMED_PARAMS = {"max_output_tokens": "max_tokens", "temperature": "temperature",
                      "top_p": "top_p", "user": "user"}
    ECHOED: dict[str, Any] = {
        "instructions": None, "max_output_tokens": None, "metadata": {},
        "parallel_tool_calls": True, "reasoning": None, "temperature": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
    }
    STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
    STATELESS = {"previous_response_id": None, "store": False, "truncation": "disabled"}
    INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
    ECHO_LIMIT = 1 << 16  # bytes; larger requests are not echoed: a stream has three copies
    KNOWN_PARAMS = (*ECHOED, *STATEFUL, "model", "input", "stream", "store", "include")
    ENCRYPTED = "reasoning.encrypted_content"
    FUNCTION_TYPES, SCHEMA_KEY = ("function", "custom"), "parameters"
    ITEMS: dict[Any, ItemWire] = {  # by event
        Text: ItemWire("message", "msg_", "response.output_text", "text", {"content_index": 0},
                       {"logprobs": []}, "response.content_part"),
        Refusal: ItemWire("message", "msg_", "response.refusal", "refusal", {"content_index": 0},
                          {}, "response.content_part"),
        Reasoning: ItemWire("reasoning", UNSIGNED_ID, "response.reasoning_summary_text", "text",
                            {"summary_index": 0}, {}, "response.reasoning_summary_part"),
        ToolCall: ItemWire("function_call", "fc_", "response.function_call_arguments", "arguments"),
    }
    CUSTOM_CALL = ItemWire("custom_tool_call", "ctc_", "response.custom_tool_call_input", "input")
    # fmt: on

    sequence_number = 0  # of the next event
    stream_started = False

    def __init__(self, body: Any, base_url: Callable[[], str] = str) -> None:
        self.output: list[dict[str, Any]] = []  # completed items
        self.annotations: list[dict[str, Any]] = []  # of the text
        self.custom_tools: set[str] = set()  # names, as they are sent
        super().__init__(body, base_url)

    # -- the request

    def to_chat(self, body: dict[str, Any]) -> dict[str, Any]:
        for name in self.STATEFUL:
            if body.get(name):
                raise not_stored(name, name)
        text, reasoning = as_dict(body.get("text")), as_dict(body.get("reasoning"))
        sent = required_field(body, "input", (str, list), "a string or a list of items")
        items = [{"role": "user", "content": sent}] if isinstance(sent, str) else sent
        tools = self.all_tools(body.get("tools"), items)
        instructions = self.convert_content(body.get("instructions") or [], "instructions")
        self.append_message("system", instructions)
        self.convert_messages(self.messages_of_items(items))
        include = list(map(str, as_list(body.get("include"))))
        self.returns_reasoning = self.ENCRYPTED in include
        self.untranslated += [f"include.{name}"[:80] for name in include if name != self.ENCRYPTED]
        self.untranslated += [f"text.{name}" for name in text if name != "format"]
        if body.get("store") is True:
            self.untranslated.append("store")
        chat = {
            "reasoning_effort": reasoning.get("effort"),
            "response_format": self.response_format(as_dict(text.get("format"))),
            "tools": tools or None,
        }
        if tools:
            chat["tool_choice"] = self.convert_tool_choice(body.get("tool_choice"), tools)
            chat["parallel_tool_calls"] = body.get("parallel_tool_calls")
        return chat

    def all_tools(self, tools: Any, items: list[Any]) -> list[dict[str, Any]]:
        """Convert the request's tools and those in its items, where Codex sends them."""
        converted = self.convert_tools(tools)
        for i, item in enumerate(map(as_dict, items)):
            if item.get("type") in TOOL_LISTS:
                converted += self.convert_tools(item.get("tools"), f"input[{i}].tools")
        return list({tool["function"]["name"]: tool for tool in converted}.values())

    @staticmethod
    def messages_of_items(items: list[Any]) -> list[tuple[str, Any, Any]]:
        """Items as messages; consecutive tool results are one message of the user.

        References to reasoning (their ids begin with "rs_") and lists of tools are dropped.
        """
        messages: list[tuple[str, Any, Any]] = []
        was_result = False
        for i, item in enumerate(map(as_dict, items)):
            param, item_type = f"input[{i}]", item.get("type", "message")
            if item_type == "item_reference" and not str(item.get("id")).startswith("rs_"):
                raise not_stored("An item_reference", param)
            if item_type == "additional_tools":
                continue
            is_result = CALL_RESULT.fullmatch(str(item_type)) is not None
            if item_type in ("message", "agent_message"):
                role = item.get("role") if item_type == "message" else "user"
                messages.append((param, role, item.get("content")))
            elif is_result and was_result:
                messages[-1][2].append(item)
            else:
                messages.append((param, "user" if is_result else "assistant", [item]))
            was_result = is_result
        return messages

    def convert_tool(self, tool: dict[str, Any], param: str, space: str | None) -> dict[str, Any]:
        """Convert a function or a custom tool, whose input becomes the only parameter."""
        if tool.get("type") != "custom":
            return super().convert_tool(tool, param, space)
        texts = tool.get("description"), as_dict(tool.get("format")).get("definition")
        description = "\n\n".join(filter(None, map(as_str, texts)))
        parameters = {"properties": {"input": {"type": "string"}}, "required": ["input"]}
        sent = {**tool, "description": description or None, "parameters": parameters}
        converted = super().convert_tool(sent, param, space)
        self.custom_tools.add(converted["function"]["name"])
        return converted

    def convert_tool_choice(self, choice: Any, tools: list[dict[str, Any]]) -> Any:
        fields = as_dict(choice)
        if fields.get("type") in self.FUNCTION_TYPES:
            return self.chosen_tool(fields, tools)
        if fields:
            names_tools = fields.get("type") == "allowed_tools"
            self.untranslated.append("tool_choice.tools" if names_tools else "tool_choice")
        return fields.get("mode") if fields else choice

    # -- the response

    def opening_frames(self) -> bytes:
        self.stream_started = True
        response = self.response_object()
        frames = self.frame("response.created", response=response)
        return frames + self.frame("response.in_progress", response=response)

    def encode(self, events: list[Event]) -> bytes:
        self.stream_started = True  # a relayed stream has no opening_frames()
        return super().encode(events)

    def frame(self, name: str, **fields: Any) -> bytes:
        self.sequence_number += 1
        return event_frame(name, sequence_number=self.sequence_number - 1, **fields)

    def encode_event(self, event: Event) -> bytes:
        if not isinstance(event, Citation):
            return super().encode_event(event)
        cited = {"type": "url_citation", **event.annotation["url_citation"]}
        self.annotations.append(cited)
        if self.open_block != (Text, None):
            return b""
        at = {**self.item_ref, "annotation_index": len(self.annotations) - 1, "annotation": cited}
        return self.frame("response.output_text.annotation.added", **at)

    def start_block(self, event: BlockEvent) -> bytes:
        wire = self.open_wire = self.wire(event)
        item = self.output_item(event, status="in_progress")
        self.open_item: Any = event
        self.item_ref = {"item_id": item["id"], "output_index": self.block_index, **wire.part_index}
        name = wire.text_event + ".delta"
        delta = to_json({"type": name, **self.item_ref, **wire.more})[:-1]
        self.head = b'event: %b\ndata: %b,"sequence_number":' % (name.encode(), delta)
        frames = self.frame("response.output_item.added", output_index=self.block_index, item=item)
        return frames + self.part_frame("added", event)

    def wire(self, event: BlockEvent) -> ItemWire:
        is_custom = isinstance(event, ToolCall) and event.name in self.custom_tools
        return self.CUSTOM_CALL if is_custom else self.ITEMS[type(event)]

    def delta(self, text: str) -> bytes:
        # the input of a custom tool is within incomplete JSON
        return b"" if self.open_wire is self.CUSTOM_CALL else self.delta_frame(text)

    def delta_frame(self, text: str) -> bytes:
        self.sequence_number += 1
        return b'%b%d,"delta":%b}\n\n' % (self.head, self.sequence_number - 1, to_json(text))

    def stop_block(self, text: str) -> bytes:
        wire, frames = self.open_wire, b""
        is_call = isinstance(self.open_item, ToolCall)
        text = text or "{}" if is_call else text
        event = dataclasses.replace(self.open_item, **{"arguments" if is_call else "text": text})
        item = self.output_item(event, self.item_ref["item_id"])
        self.output.append(item)
        if wire is self.CUSTOM_CALL:
            text = custom_input(text)
            frames = self.delta_frame(text)
        fields = {**self.item_ref, **wire.more, wire.text_field: text}
        frames += self.frame(wire.text_event + ".done", **fields) + self.part_frame("done", event)
        if isinstance(event, Text):
            self.annotations = []
        at = self.block_index
        return frames + self.frame("response.output_item.done", output_index=at, item=item)

    def part_frame(self, step: str, event: BlockEvent) -> bytes:
        """The event of an item's only part that is added or done; a tool call has none."""
        if isinstance(event, ToolCall):
            return b""
        name = f"{self.wire(event).part_event}.{step}"
        return self.frame(name, **self.item_ref, part=self.part_object(event))

    def finish_frames(self, finish: Finish) -> bytes:
        response = self.response_object(finish)
        return self.frame(f"response.{response['status']}", response=response)

    def error_frames(self, error: APIError) -> bytes:
        frames = self.flush_deferred() if self.stream_started else self.opening_frames()
        details = self.error_body(error)["error"]
        failure = {"code": error.code or "server_error", "message": error.message}
        response = {**self.response_object(), "status": "failed", "error": failure}
        frames += self.frame("error", **{**details, "type": "error", "error": details})
        return frames + self.frame("response.failed", response=response)

    def response_body(self, answer: Answer) -> dict[str, Any]:
        for each in answer.citations:
            self.encode_event(each)
        self.output = list(map(self.output_item, self.answer_blocks(answer)))
        return self.response_object(answer.finish)

    def response_object(self, finish: Finish | None = None) -> dict[str, Any]:
        original, usage = self.call.original, finish and finish.usage
        sent = as_dict(original.body) if len(original.raw_body) <= self.ECHO_LIMIT else {}
        reason = finish and self.INCOMPLETE_REASONS.get(finish.reason)
        head = {"id": self.id, "object": "response", "created_at": self.created}
        return {
            **head,
            "model": self.model,
            "output": self.output,
            "status": "incomplete" if reason else "completed" if finish else "in_progress",
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            **self.ECHOED,
            **{name: sent[name] for name in self.ECHOED if sent.get(name) is not None},
            **self.STATELESS,
            "usage": response_usage(usage) if usage else None,
        }

    def part_object(self, event: TextEvent) -> dict[str, Any]:
        """The only part of a message or of reasoning."""
        if isinstance(event, Reasoning):
            return {"type": "summary_text", "text": event.text}
        if isinstance(event, Refusal):
            return {"type": "refusal", "refusal": event.text}
        fields = {"text": event.text, "annotations": self.annotations, "logprobs": []}
        return {"type": "output_text", **fields}

    def output_item(
        self, event: BlockEvent, item_id: str = "", status: str = "completed"
    ) -> dict[str, Any]:
        """An item of the output, new without an ID; it has no parts until it is completed."""
        wire = self.wire(event)
        item_id = item_id or wire.id_prefix + new_id()
        item: dict[str, Any] = {"id": item_id, "type": wire.type, "status": status}
        if isinstance(event, ToolCall):
            name, space = self.client_name(event)
            item.update(call_id=event.id, name=name, **({"namespace": space} if space else {}))
            is_custom = wire is self.CUSTOM_CALL
            item[wire.text_field] = custom_input(event.arguments) if is_custom else event.arguments
            return item
        parts = [self.part_object(event)] if status == "completed" else []
        if isinstance(event, Text):
            return {**item, "role": "assistant", "content": parts}
        encrypted = {"encrypted_content": UNSIGNED} if self.returns_reasoning else {}
        return {**item, "summary": parts, **encrypted}


def response_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Token counts of a response, from those of a chat."""
    cached = usage_detail(usage, "prompt", "cached_tokens")
    written = usage_detail(usage, "prompt", "cache_write_tokens")
    reasoning = usage_detail(usage, "completion", "reasoning_tokens")
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        **({"estimated": True} if is_estimated(usage) else {}),
    }


def not_stored(name: str, param: str) -> APIError:
    """Error for a reference to an earlier response."""
    return bad_request(
        f"{name!r} can't be used: nothing is stored here. Send the whole conversation as 'input' "
        '(many clients do so with "store": false).',
        param,
    )


class Passthrough(Dialect):
    """Any other POST below /v1: relayed as it is to a controller that offers the path."""

    PATH = re.compile(r"/v1(/[A-Za-z0-9_-]+)+")

    def __init__(self, data: bytes, content_type: str) -> None:
        body = self.document(data, content_type)
        field = None if body else form_model(data, content_type)
        model = body.get("model") if field is None else field.value
        chat = {"model": model} if isinstance(model, str) else {}
        self.call = Call(chat, stream=True, relay_only=True)
        original, binary = self.call.original, "application/octet-stream"
        original.body, original.form_model = body or None, field
        # We decoded JSON as UTF-8. With a different charset the upstream could read another model.
        original.content_type = "application/json" if body else content_type or binary

    def prepare(self) -> None:
        """Nothing: its answers are relayed, and its body may be very large."""

    @staticmethod
    def document(data: bytes, content_type: str) -> dict[str, Any]:
        """The JSON object of a body; {} for anything else, which the upstream may accept."""
        # By default, curl -d sends any body as a form.
        vague = ("", URLENCODED, "text/plain", "application/octet-stream")
        kind, is_object = media_type(content_type), data[:64].lstrip().startswith(b"{")
        if not (is_json_type(kind) or kind in vague and is_object):
            return {}
        check_json(data, MAX_RELAYED_VALUES)
        try:
            return as_dict(_parse(data, _decode))
        except ValueError:
            return {}

    def ping_frame(self, style: str) -> bytes:
        return b""


# -- Limits of a client's key to some models. An upstream must never read a model from the request
# that differs from the one we have checked, so ambiguous bodies are rejected.

URLENCODED = "application/x-www-form-urlencoded"
MAX_FORM_PARTS = 1000
MAX_PART_HEAD = 4096
# Segments of a path that precede a model's name in some APIs.
MODEL_IN_PATH = frozenset(("deployments", "engines", "models"))
_UTF_8 = r'(?: *; *charset="?utf-8"?)?'
_MULTIPART = re.compile(
    rf"(?i)multipart/form-data{_UTF_8} *; *boundary=(\"?)([0-9a-z'()+_,./:=?-]{{1,70}})\1{_UTF_8}"
)
_DISPOSITION = re.compile(
    r'(?i)form-data; *name=(?:"([^"\\%]*)"|([A-Za-z0-9_.-]+))'
    r'(; *filename=(?:"[^"\\]*"|[^;"\\ ]+))?(; *filename\*=[^;" ]+)?'
)


def lenient_name(name: str) -> str:
    """The name that a lenient upstream may read a field as."""
    # Go's JSON decoder ignores case; PHP drops a bracket and what follows it.
    return name.partition("[")[0].partition("\0")[0].strip().casefold()


def remove_model_params(query: str) -> str:
    """Remove the model from a query."""
    # Only the body's model was checked, but LiteLLM prefers the query's.
    params = re.finditer("([^&;=]*)[^&;]*[&;]?", query)
    names = ((param[0], urllib.parse.unquote_plus(param[1])) for param in params)
    return "".join(text for text, name in names if lenient_name(name) != "model").rstrip("&;")


def check_names(names: Iterable[str], refused: Iterable[str] = ()) -> None:
    """Raise APIError 400 for refused fields, and for "model" written in another way."""
    refused = {name.casefold() for name in refused}
    for name in names:
        if "model" in name.lower() and name != "model" and lenient_name(name) == "model":
            raise bad_request(f"The field {name[:40]!r} must be written 'model'.", "model")
        if refused and lenient_name(name) in refused:
            raise bad_request(f"The field {name[:40]!r} is not allowed for this key.", name[:40])


def check_charset(content_type: str) -> None:
    """Raise APIError 415 for a charset other than UTF-8, in which we read the body."""
    for parameter in content_type.lower().split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' \t"') not in ("utf-8", "utf8"):
            raise APIError(415, "The charset of the body must be UTF-8.")


def apply_key_limits(call: Call, options: ClientKeySettings, headers: dict[str, str]) -> None:
    """Apply a key's limits to a call. Raises APIError, also for an ambiguous body."""
    call.allowed_models = options.models
    if not options.models and not options.refuse_fields:
        return
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError(415, "The body must be sent without Content-Encoding.")
    if call.relay_only:
        check_charset(headers.get("content-type", ""))
    original = call.original
    form = None if original.body else form_fields(original.raw_body, original.content_type)
    check_names(original.body or [field.name for field in form or ()], options.refuse_fields)
    if options.models and MODEL_IN_PATH.intersection(original.path.lower().split("/")):
        raise model_not_found("")
    if original.body:
        # Send what we parsed: of duplicate "model" keys an upstream could read the other one.
        original.is_changed = True
    elif form is not None:
        check_form_model(form, options.models)
    elif not options.models:
        raise APIError(415, "With this key the body must be JSON or a form.")


def images_requested(original: OriginalRequest) -> int:
    """The number of images in a relayed request, as a lenient upstream reads its "n"."""
    fields: list[tuple[str, Any]] = list(as_dict(original.body).items())
    data = original.raw_body
    with contextlib.suppress(APIError):  # of a malformed form
        form = () if fields else form_fields(data, original.content_type) or ()
        fields += [(part.name, data[part.start : part.end][:99].decode("latin-1")) for part in form]
    values = (str(value)[:99] for name, value in fields if lenient_name(name) == "n")
    numbers = [re.fullmatch(r"\+?([0-9]{1,90})(?:\.0*)?", value.strip()) for value in values]
    return max((int(number[1]) for number in numbers if number), default=1) or 1


def check_form_model(form: list[FormField], models: tuple[str, ...]) -> None:
    """Check that a form names one model, which the pool checks. Raises APIError."""
    names = [field.value for field in form if field.name == "model"]
    if len(names) > 1 or any(field.name == "_charset_" for field in form):
        raise bad_request("The form must have exactly one field 'model', in UTF-8.", "model")
    if models and not any(names):
        raise model_not_found("")


class FormField(NamedTuple):
    """A field of a form; only the model's value is kept. The span is the value's."""

    name: str
    value: str
    start: int = 0
    end: int = 0


def form_model(data: bytes, content_type: str) -> FormField | None:
    """Return the form's field that names the model; None if there isn't exactly one."""
    with contextlib.suppress(APIError):  # a form that is odd to us may be fine for the upstream
        fields = [each for each in form_fields(data, content_type) or () if each.name == "model"]
        if len(fields) == 1 and fields[0].value:
            return fields[0]
    return None


def form_fields(data: bytes, content_type: str) -> list[FormField] | None:
    """Names and values of a form's fields, or None for another content type.

    Values other than the model's are "". Raises APIError 400 if the form is malformed.
    """
    kind = media_type(content_type)
    if kind == URLENCODED:
        return urlencoded_fields(data)
    return multipart_fields(data, content_type) if kind == "multipart/form-data" else None


def urlencoded_fields(data: bytes) -> list[FormField]:
    """The fields of a form of the type application/x-www-form-urlencoded."""
    if data.count(b"&") + data.count(b";") >= MAX_FORM_PARTS:
        raise bad_request("The form has too many fields.")
    fields = []
    try:
        for match in re.finditer(b"(?:^|[&;])([^&;=]*)=?([^&;]*)", data):
            name = percent_decoded(match[1])
            value = percent_decoded(match[2]) if lenient_name(name) == "model" else ""
            fields.append(FormField(name, value, *match.span(2)))
    except ValueError:
        raise bad_request("The form is malformed.") from None
    return fields


def percent_decoded(text: bytes) -> str:
    """Decode a name or value. ValueError if it is too long or not valid UTF-8."""
    if len(text) > MAX_PART_HEAD:
        raise ValueError("too long")
    return urllib.parse.unquote_plus(text.decode("ascii"), errors="strict")


def multipart_fields(data: bytes, content_type: str) -> list[FormField]:
    """The parts of a form of the type multipart/form-data (RFC 7578).

    A part must begin wherever the boundary occurs, or a lenient parser could find further parts.
    """
    match = _MULTIPART.fullmatch(content_type)
    if not match:
        raise bad_request("The boundary of the form is malformed.")
    delimiter, pos = b"--" + match[2].encode(), 0
    fields: list[FormField] = []
    while data.startswith(delimiter + b"\r\n", pos) and len(fields) < MAX_FORM_PARTS:
        start = pos + len(delimiter) + 2
        end = data.find(b"\r\n\r\n", start, start + MAX_PART_HEAD)
        pos = data.find(delimiter, start)
        if end < 0 or pos < end + 6 or data[pos - 2 : pos] != b"\r\n":
            raise bad_request("A part of the form is malformed.")
        value = data[end + 4 : min(pos - 2, end + 5 + MAX_NAME)]
        fields.append(FormField(*part_field(data[start:end], value), end + 4, pos - 2))
    ends = (delimiter + b"--\r\n", delimiter + b"--")
    if not fields or data[pos : pos + len(delimiter) + 5] not in ends:
        raise bad_request("The form is not terminated, or has too many parts.")
    return fields


def part_field(head: bytes, value: bytes) -> tuple[str, str]:
    """Name and value of a part; "" for values other than the model. APIError 400."""
    try:
        pairs = [parse_field.__wrapped__(line) for line in head.decode("latin-1").split("\r\n")]
        headers = dict(pairs)
        disposition = headers.get("content-disposition", "").encode("latin-1").decode("utf-8")
        match = _DISPOSITION.fullmatch(disposition)
    except ValueError:
        match = None
    if not match or len(headers) < len(pairs):
        raise bad_request("The head of a part of the form is malformed.")
    name = match[1] if match[2] is None else match[2]
    if lenient_name(name) != "model":
        return name, ""
    content_type = headers.get("content-type", "text/plain")
    check_charset(content_type)
    text, is_file = value.decode("utf-8", "replace"), match[3] or match[4]
    is_text = media_type(content_type) == "text/plain" and text.isprintable()
    more_headers = set(headers) - {"content-disposition", "content-type"}
    if is_file or not is_text or more_headers or len(value) > MAX_NAME:
        raise bad_request("The model must be a plain text field of the form.", "model")
    return name, text


# == 16. loop =================================================================================
# One thread that owns every client socket, and the upstream socket of every relayed response.
# Knows no more of HTTP than message framing.


READABLE, WRITABLE = 1, 4  # events of a socket, as select.epoll has them
_SELECTOR_EVENTS = {
    READABLE: selectors.EVENT_READ,
    WRITABLE: selectors.EVENT_WRITE,
    READABLE | WRITABLE: selectors.EVENT_READ | selectors.EVENT_WRITE,
}
Callback = Callable[[], Any]


class SelectorPoller:
    """A selector with the methods of select.epoll, for other systems. Loop thread."""

    MAX_SELECT = 500  # sockets: select() on Windows takes 512, the others a descriptor below 1,024

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector, self.unregister, self.close = selector, selector.unregister, selector.close

    def register(self, descriptor: int, events: int) -> None:
        """Register a socket; OSError if select() has no room for it."""
        count = len(self.selector.get_map())
        is_full = count >= self.MAX_SELECT if os.name == "nt" else descriptor >= 1024
        if is_full and isinstance(self.selector, selectors.SelectSelector):
            raise OSError(errno.EMFILE, "select() can't watch more sockets")
        self.selector.register(descriptor, _SELECTOR_EVENTS[events])

    def modify(self, descriptor: int, events: int) -> None:
        self.selector.modify(descriptor, _SELECTOR_EVENTS[events])

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        """Return (descriptor, events) of the sockets ready within so many seconds."""
        return [(key.fd, events) for key, events in self.selector.select(seconds)]


class EventLoop(threading.Thread):
    """The loop thread: dispatches I/O events, scheduled callbacks and a periodic tick.

    add(), modify() and remove(): loop thread. call_soon_threadsafe() and stop(): any thread.
    Callbacks must not block. An exception in a callback is logged and aborts its own socket only.
    """

    TICK = 0.25  # seconds between two calls of on_tick

    def __init__(self, on_tick: Callable[[float], None], selector: Any = None) -> None:
        super().__init__(name="akashproxy loop", daemon=True)
        self.on_tick = on_tick
        if selector is None and hasattr(select, "epoll"):
            self.poller: Any = select.epoll()  # 4 % less CPU time per token than its selector
        else:
            self.poller = SelectorPoller(selector or selectors.DefaultSelector())
        # By descriptor: the callback, and the one to call if it raises an exception.
        self.registrations: dict[int, tuple[Callback, Callback]] = {}
        self.scheduled: deque[Callback] = collections.deque()
        self.awake = False  # True: ``scheduled`` will be read before the next wait
        self.stopped = False
        self.now = time.monotonic()
        self.wakeup_r, self.wakeup_w = socket.socketpair()
        self.wakeup_r.setblocking(False)
        self.wakeup_w.setblocking(False)
        read = functools.partial(self.wakeup_r.recv, 4096)
        self.add(self.wakeup_r, read, read)

    def add(self, sock: Any, callback: Callback, abort: Callback, events: int = READABLE) -> None:
        """Register a socket; OSError if select() has no room for it."""
        descriptor = sock.fileno()
        self.poller.register(descriptor, events)
        self.registrations[descriptor] = callback, abort

    def modify(self, sock: Any, events: int) -> None:
        """Change the events of a registered socket."""
        self.poller.modify(sock.fileno(), events)

    def remove(self, sock: Any) -> None:
        """Unregister a socket before it is closed or handed to a worker. Idempotent."""
        descriptor = sock.fileno()
        if self.registrations.pop(descriptor, None) is not None:
            self.poller.unregister(descriptor)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Schedule a callback for the loop thread. Any thread."""
        self.scheduled.append(callback)
        if not self.awake:  # two threads may both read False: the second byte is harmless
            self.awake = True
            try:
                self.wakeup_w.send(b"\0")
            except OSError:
                return  # the pipe is full, so its wait will end; or the loop has been closed

    def stop(self) -> None:
        """End the loop after its current iteration. Any thread."""
        self.stopped = True
        self.call_soon_threadsafe(bool)  # only to end its wait

    def run(self) -> None:
        poll, registrations, scheduled = self.poller.poll, self.registrations, self.scheduled
        next_tick = 0.0
        while not self.stopped:
            # Before ``scheduled`` is read. Otherwise: the loop reads an empty ``scheduled``; a
            # worker appends to it, sees awake and sends no byte; the loop waits for a whole tick.
            self.awake = False
            try:
                ready = poll(0 if scheduled else self.TICK)
            except (OSError, ValueError):
                log.exception("the selector rejected its sockets")
                time.sleep(self.TICK)
                ready = []
            self.awake = True
            self.now = time.monotonic()
            for descriptor, _ in ready:
                registration = registrations.get(descriptor)
                if registration is not None:  # else a callback of the same wait has removed it
                    try:
                        registration[0]()
                    except Exception:
                        self._abort(registration[1])
            if self.now >= next_tick:
                next_tick = self.now + self.TICK
                scheduled.append(functools.partial(self.on_tick, self.now))
            if scheduled:
                self._run_scheduled()
        self.close()

    def _run_scheduled(self) -> None:
        for _ in range(len(self.scheduled)):  # what these callbacks schedule waits its turn
            try:
                self.scheduled.popleft()()
            except Exception:
                log.exception("a bug in akashproxy, on the loop thread")

    def close(self) -> None:
        """Close the descriptors of a loop that has ended or was never started."""
        self.poller.close()
        self.wakeup_r.close()
        self.wakeup_w.close()

    @staticmethod
    def _abort(abort: Callback) -> None:
        log.exception("a bug in akashproxy, on the loop thread")
        try:
            abort()
        except Exception:
            log.exception("the connection could not be closed properly")


class State(enum.Enum):
    """State of a client connection. Changed on the loop thread only.

    ::

        IDLE ──► READING                         a part of a request has arrived
        IDLE, READING ──► RESPONDING             request complete or rejected: see Request
        RESPONDING ──► IDLE                      response sent
        RESPONDING ──► LINGERING                 response sent, input discarded until EOF
        any ──► CLOSED
    """

    IDLE = enum.auto()
    READING = enum.auto()
    RESPONDING = enum.auto()
    LINGERING = enum.auto()
    CLOSED = enum.auto()


# Not State.IDLE: up to Python 3.11 an access to an Enum's member is a slow call.
IDLE, READING, RESPONDING, LINGERING, CLOSED = State


class Head(NamedTuple):
    """Parsed request head. Any thread."""

    method: str = "-"
    path: str = "-"  # percent-decoded once
    query: str = ""
    http_minor: str = "1"
    headers: dict[str, str] = {}  # by lower-case name


class Route(NamedTuple):
    """A row of ROUTES matched with a request. Any thread."""

    label: str = "other"  # in the metrics
    targets: dict[str, Any] = {}  # {method: Dialect subclass, or function of a Handler}
    remainder: str = ""  # the part of the path that matched {}

    def target(self, method: str) -> Any:
        """Return the target of a method; None if it isn't allowed."""
        return self.targets.get("GET" if method == "HEAD" else method)

    def allow(self) -> str:
        """Return the value of the Allow header."""
        methods = [*self.targets, *(["HEAD"] if "GET" in self.targets else []), "OPTIONS"]
        return ", ".join(methods if self.targets else ["GET", "HEAD", "POST", "OPTIONS"])


class Request:
    """Request of a client. Loop thread while read or relayed, else its worker thread."""

    head = Head()
    route = Route()
    body: bytes | bytearray = b""
    body_unread = False  # the body, or where the next request starts, is not known
    keep_alive = False
    error: APIError | None = None  # the reason to reject it
    key: KeyLimiter | None = None  # None: no token, or one of BEARER_TOKEN
    counted = False  # holds a slot of the key
    decoder: BodyDecoder | None = None  # while the body is being read
    call: Call | None = None  # set for model calls and images
    source: Any = None  # Exchange or UpstreamResponse, closed when the response is complete
    relay: StreamRelay | None = None  # while the loop relays an upstream's response

    def __init__(self, connection: Connection) -> None:
        self.connection, self.server = connection, connection.server
        self.settings = connection.server.settings  # a reload must not change them midway
        self.id = "req_" + new_id()
        self.started_at = time.monotonic()
        self.cancellation = Cancellation(functools.partial(peer_has_closed, connection.sock))
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

        A race: the loop cancels, then reads ``call``. Setting ``call``, then checking the reason,
        at least one of the two threads sees what the other has written.
        """
        self.call, call.cancellation = call, self.cancellation
        if self.cancellation.reason is not None:
            raise self.cancellation.reason


class AccessRecord:
    """Values of a model call for the access log and the metrics. Owned as its Request."""

    model = answered_model = controller = ""
    route: Sequence[str] = ()  # the attempts, such as "akash=429"
    broken_off = False  # failed after its first byte
    usage: dict[str, int] | None = None
    first_token_at = 0.0


def check_body(server: Server, size: int, more: int) -> None:
    """Raise APIError 413 for too large a body, 503 without room for ``more`` bytes."""
    settings = server.settings
    limit = min(settings.max_body, settings.max_body_total)
    if size > limit:
        raise APIError(413, f"The body is larger than {limit} bytes.")
    if server.body_bytes + more > settings.max_body_total:
        message = "The server is receiving too many large requests; retry later."
        raise APIError(503, message, code="overloaded", retry_after=1)


class Connection:
    """A client socket with its buffers, deadline and state. Loop thread, unless noted.

    A complete request goes to a worker; the next one is parsed after its response has been sent.
    """

    HIGH_WATER = 1 << 18  # bytes of output above which wait_for_room() blocks
    MIN_UPLOAD_RATE = 4000  # bytes per second of a request's body
    LINGER_SECONDS = 2.0
    LINGER_BYTES = 4 << 20

    def __init__(self, sock: socket.socket, client_address: Any, server: Server) -> None:
        self.sock, self.client_address = sock, client_address
        self.server, self.loop = server, server.loop
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)  # a client that does not read must not block the loop
        self.state = IDLE
        self.input = bytearray()  # received, not yet parsed
        self.output = bytearray()  # to be sent
        self.room = threading.Condition()  # guards ``output`` and CLOSED; notified by each flush()
        self.request: Request | None = None  # being read or answered
        self.on_drained: Callback | None = None  # called once all output is sent
        self.pipelined = False  # the next request or EOF has come: nothing more is read
        self.events = 0  # registered with the loop
        self.linger_budget = 0
        self.deadline = math.inf
        self._update_events()

    # -- reading

    def on_ready(self) -> None:
        """Handle a readable or writable socket."""
        if self.state is not CLOSED and self.output:
            self.flush()
        if self.request is not None and self.state is RESPONDING:
            self._check_disconnect(self.request)
        elif self.state is not CLOSED:  # else a callback of the same select() has closed it
            self._receive()

    def _receive(self) -> None:
        try:
            data = self.sock.recv(RECV_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.state is LINGERING:
            self.linger_budget -= len(data)
            if not data or self.linger_budget <= 0:
                self.close()
        elif data:
            scanned = len(self.input)  # no head ends within these bytes
            self.input += data
            self._advance(scanned)
        elif self.input or self.request is not None:
            part = "head" if self.request is None else "body"
            self._dispatch(ProtocolError(f"the connection ended within a {part}"))
        else:
            self.close()

    def _advance(self, scanned: int = 0) -> None:
        """Parse ``input``: head, gate, body; then dispatch the request to a worker."""
        try:
            request = self.request or self._read_head(scanned)
            if request is not None and self._read_body(request):
                self._dispatch()
        except (ProtocolError, APIError) as error:
            self._dispatch(error)

    def _read_head(self, scanned: int) -> Request | None:
        """Parse the head and pass it through the gate; None while it is incomplete."""
        while self.input.startswith(b"\r\n"):  # RFC 9112, 2.2: skip empty lines before a request
            del self.input[:2]
        end = find_head_end(self.input, max(0, scanned - 3))
        if end < 0:
            if self.state is IDLE:
                self.state = READING
                self.set_deadline(self.server.settings.head_timeout)
            return None
        self.request = request = Request(self)
        head = bytes(self.input[:end])
        del self.input[: end + 4]
        request.parse_head(head)
        decoder = BodyDecoder(request.head.headers)
        request.body_unread = not decoder.done
        check_head(request, decoder)
        if len(self.input) >= decoder.remaining > 0:  # the body came with its head
            request.body, request.body_unread = bytes(self.input[: decoder.remaining]), False
            del self.input[: decoder.remaining]
        elif request.body_unread:
            request.decoder, request.body = decoder, bytearray()
            if request.head.headers.get("expect") and not self.input:
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.set_deadline(self.server.settings.body_timeout)
        return request

    def _read_body(self, request: Request) -> bool:
        """Read the body; True if it is complete or need not be read."""
        decoder, server = request.decoder, self.server
        if decoder is None:
            return True
        if self.input:
            data, self.input = bytes(self.input), bytearray()
            payload = decoder.feed(data)
            size = len(request.body) + len(payload) + decoder.remaining  # as far as it is known
            check_body(server, size, len(payload))
            server.body_bytes += len(payload)
            request.body += payload
            # At most BODY_TIMEOUT from now: otherwise a client could send a burst, then stall for
            # as long as the burst has earned.
            earned = self.deadline + len(data) / self.MIN_UPLOAD_RATE
            self.deadline = min(earned, self.loop.now + server.settings.body_timeout)
        if decoder.done:
            self.input += decoder.trailing_data
            body, request.body_unread = bytes(request.body), False
            self._discard_body(request)
            request.body = body
        elif request.head.method in BODILESS_METHODS:
            self._discard_body(request)  # not needed: the response closes the connection
        elif self.state is IDLE:  # else the client may have disconnected before 100 Continue
            self.state = READING
        return request.decoder is None

    def _discard_body(self, request: Request) -> None:
        """Drop what has been received of a body."""
        if request.decoder is not None:
            self.server.body_bytes -= len(request.body)
            request.decoder, request.body = None, b""

    def _dispatch(self, error: None | ProtocolError | APIError = None) -> None:
        """Hand the request to a worker, with the reason if it is rejected."""
        request = self.request = self.request or Request(self)
        if error is not None:
            if isinstance(error, ProtocolError) or not request.head.headers:
                request.body_unread = True  # the start of a next request can't be determined
            if isinstance(error, ProtocolError):
                error = APIError(error.status, f"Bad request: {error}.")
            self._discard_body(request)
        request.error = error
        self.state, self.deadline = RESPONDING, math.inf
        if error is None and is_health_check(request):
            request.writer.send = self.send
            self.server.serve_request(request)
        else:
            self.submit(request, functools.partial(self.server.serve_request, request))

    def submit(self, request: Request, task: Callback) -> None:
        """Run a step of the request on a worker; reject or disconnect without one."""

        def submit() -> None:
            try:
                self.server.submit(task)
            except RuntimeError as error:  # the system allows no more threads
                log_exhaustion("cannot handle a request", error)
                if request.writer.status:
                    self.disconnect()
                else:
                    self.reject()
                self.end_request()

        # Once the loop has handled what is ready: a worker that is started earlier only waits for
        # the interpreter's lock, which makes four switches of threads per request out of one.
        self.loop.scheduled.append(submit)

    def reject(self) -> None:
        """Send 503 and close: the server has no room for this client."""
        if self.send(TOO_MANY_CLIENTS):
            self._linger()

    def _check_disconnect(self, request: Request) -> None:
        """Handle input during a response: EOF, or the beginning of the next request.

        A client that half-closes (``printf ... | nc``) looks like one that has disconnected. It
        gets any response that is made here, but no upstream works for it.
        """
        data = peek(self.sock)
        if data == b"":
            request.cancellation.cancel()  # also a call that its worker is about to begin
            if request.call is not None:
                self.disconnect()
                return
        if data is not None:
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
        """Buffer output for the loop; ClientDisconnected if closed. Any thread."""
        with self.room:
            if self.state is CLOSED:
                raise ClientDisconnected("the client disconnected")
            first = not self.output
            self.output += data
        if first and not last:  # end_request() sends the last: one callback less for the loop
            self.loop.call_soon_threadsafe(self.flush)

    def wait_for_room(self) -> None:
        """Block while output is above HIGH_WATER; ClientDisconnected if closed. Worker."""
        with self.room:
            self.room.wait_for(lambda: len(self.output) < self.HIGH_WATER or self.state is CLOSED)
            if self.state is CLOSED:
                raise ClientDisconnected("the client disconnected")

    def flush(self) -> bool:
        """Send buffered output; True if nothing is left."""
        if self.state is CLOSED:
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
        if self.state is RESPONDING:  # else the deadline is that of reading
            self.deadline = math.inf
        if self.events != READABLE:
            self._update_events()
        if self.on_drained is not None:
            callback, self.on_drained = self.on_drained, None
            callback()
        return True

    def _start_write_timeout(self) -> None:
        """Restart the write timeout: it bounds a stall, not the whole response."""
        self.set_deadline(self.server.settings.write_timeout)
        self._update_events()

    def call_when_drained(self, callback: Callback) -> None:
        """Call back once all output is sent, or end the request of a client that has left."""
        if self.state is CLOSED:
            self.end_request()
        elif self.output:
            self.on_drained = callback
        else:
            callback()

    # -- ending a request, and the connection

    def end_request(self) -> None:
        """Log a complete response; then read the next request, linger or close."""
        request = self.request
        if request is None:
            return
        if self.output and not self.flush() and self.state is not CLOSED:
            self.on_drained = self.end_request
            return
        self.request = None
        if request.source is not None:
            request.source.close()
        self.server.on_request_end(request)
        del request.writer  # breaks a reference cycle: its memory is free at once
        if self.state is CLOSED:
            self.server.connections.discard(self)
        elif self.state is LINGERING:
            return
        elif request.body_unread or self.pipelined and not request.keep_alive:
            self._linger()
        elif request.keep_alive:
            self.pipelined, self.state = False, IDLE
            self.set_deadline(self.server.settings.keepalive_timeout)
            if self.input:
                self._advance()
            if self.events != READABLE:
                self._update_events()
        else:
            self.close()

    def _linger(self) -> None:
        """Half-close, then discard input for a while (lingering close, RFC 9112, 9.6).

        Closing with unread input sends a reset, which can destroy the response in transit.
        """
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.state, self.pipelined, self.linger_budget = LINGERING, False, self.LINGER_BYTES
        self.set_deadline(self.LINGER_SECONDS)
        self._update_events()

    def stop(self) -> None:
        """End the connection on shutdown; its request is cancelled with an error 503."""
        error = APIError(503, "The server is stopping.", code="stopping")
        if self.request is not None:
            self.request.cancellation.cancel(error)
        if self.state is READING:
            self._dispatch(error)
        elif self.state is IDLE:
            self.close()

    def disconnect(self) -> None:
        """Close, and cancel the request: the client has disconnected or must be dropped."""
        request, responding, on_drained = self.request, self.state is RESPONDING, self.on_drained
        self.close()
        if request is None or not responding:
            return
        if request.relay is not None:
            request.relay.on_client_disconnect()
        elif on_drained is not None:  # no worker has it: the output was to be sent first
            self.end_request()
        request.cancellation.cancel()

    def close(self) -> None:
        """Close the socket. A worker's request is logged when the worker ends it."""
        if self.state is CLOSED:
            return
        if self.request is not None:
            self._discard_body(self.request)
        if self.state is not RESPONDING:
            self.request = None
        with self.room:
            self.state = CLOSED
            self.output.clear()
            self.room.notify_all()
        self.deadline, self.on_drained = math.inf, None
        self.loop.remove(self.sock)
        self.server.shutdown_request(self.sock)
        if self.request is None:
            self.server.connections.discard(self)

    # -- time

    def set_deadline(self, seconds: float) -> None:
        """Set the deadline, in seconds from now."""
        self.deadline = self.loop.now + seconds

    def on_tick(self, now: float) -> None:
        """Enforce the deadline, detect a disconnected client, send pings."""
        request = self.request
        if self.server.draining and self.state is IDLE:
            self.deadline = min(self.deadline, now + LAME_DUCK_SECONDS)
        if now >= self.deadline:
            if self.state is READING and (self.input or request is not None):
                part = "head" if request is None else "body"
                self._dispatch(APIError(408, f"The request's {part} took too long."))
            elif self.state is RESPONDING:
                self.disconnect()
            else:
                self.close()
        elif request is not None and self.state is RESPONDING:
            if self.pipelined and request.call is not None and peer_has_closed(self.sock):
                self.disconnect()
            elif now - request.writer.last_write > request.settings.heartbeat:
                request.writer.on_idle(now)

    def _update_events(self) -> None:
        """Register the events of interest; a selector rejects an empty set."""
        events = (0 if self.pipelined else READABLE) | (WRITABLE if self.output else 0)
        if events == self.events or self.state is CLOSED:
            return
        if not self.events:
            self.loop.add(self.sock, self.on_ready, self.disconnect, events)
        elif events:
            self.loop.modify(self.sock, events)
        else:
            self.loop.remove(self.sock)
        self.events = events


# == 17. relay ================================================================================
# Writes responses to clients. Knows no upstreams' formats.


Headers = Iterable[tuple[str, str]]


class ResponseWriter:
    """Writes one response: status line, headers, framing.

    Any thread: the request's worker; the loop for pings and while it relays. The lock prevents a
    ping in the middle of what a worker is writing. The head is sent with the body's first bytes.
    """

    status = 0  # 0: not started
    finished = chunked = False
    head = b""  # not sent yet
    bytes_sent = 0  # of the body
    tail = b"\n\n"  # last bytes of the body
    has_event_id = False  # an event of the stream may have had a line "id:"
    ping_frame: Any = None  # ping_frame(style) -> bytes; None: pings are not possible

    def __init__(self, request: Request) -> None:
        self.request, self.connection = request, request.connection
        self.lock = threading.RLock()
        # On the loop thread, for /health and in a StreamRelay: Connection.send.
        self.send: Callable[..., Any] = self.connection.enqueue
        self.last_write = request.started_at

    def start(self, status: int, headers: Headers, length: int | None = None) -> None:
        """Begin the response; without a length its body is chunked."""
        request = self.request
        if request.body_unread or request.server.draining:
            request.keep_alive = False
        self.status = status
        self.chunked = length is None and request.head.http_minor == "1"
        framing = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        if length is not None and status not in (204, 304):
            framing = f"Content-Length: {length}\r\n"
        elif length is None and not self.chunked:
            request.keep_alive = False  # HTTP/1.0: the end of the connection ends the body
        if not request.keep_alive:
            framing += "Connection: close\r\n"
        elif request.head.http_minor == "0":
            framing += "Connection: keep-alive\r\n"
        status_line = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} "
        self.head = (
            f"{status_line}\r\n{server_date_headers(int(time.time()))}{header_lines(*headers)}"
            f"{framing}x-request-id: {request.id}\r\n{cors_headers(request)}\r\n"
        ).encode("ascii")

    def write(self, data: bytes) -> Any:
        """Write a part of the body; returns and raises what ``send`` does."""
        with self.lock:
            if data or self.head:
                self.last_write = self.connection.loop.now
            return self.send(self._frame(data))

    def write_chunk(self, frame: bytes) -> bool:
        """Write complete frames to a chunked stream that has begun. Loop thread."""
        size, connection = len(frame), self.connection
        self.bytes_sent += size
        self.tail, self.last_write = frame, connection.loop.now
        return connection.send(b"%x\r\n%b\r\n" % (size, frame))

    def finish(self, data: bytes = b"") -> Any:
        """Write the last part of the body, and end it."""
        with self.lock:
            # Before the end is sent. Otherwise: the client reads the end and sends its next
            # request; that is rejected by max_concurrency; this request releases its slot.
            release_key(self.request)
            self.ping_frame, self.finished = None, True
            end = b"0\r\n\r\n" if self.chunked and self.request.head.method != "HEAD" else b""
            return self.send(self._frame(data, end), last=True)

    def respond(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        """Write a complete response."""
        with self.lock:
            self.start(status, headers.items(), length=len(data))
            self.finish(data)

    def break_off(self) -> None:
        """End a body that can't carry an error: no last chunk marks it incomplete."""
        self.request.keep_alive, self.chunked = False, False
        self.finish()

    def on_idle(self, now: float) -> None:
        """Send a ping, so that no proxy times out a stream that is idle. Loop thread."""
        if self.ping_frame is None or not self.lock.acquire(blocking=False):
            return  # the worker that holds the lock is writing: no ping is needed
        try:
            if self.ping_frame is None or now - self.last_write <= self.request.settings.heartbeat:
                return  # a worker wrote or finished between the check and acquire()
            self.last_write = now
            frame = self.ping_frame(self.request.settings.pings)
            if not self.tail.endswith((b"\n\n", b"\r\n\r\n", b"\n\r\n")) or self.has_event_id:
                # A blank line would end an event: a part of one, or, once there was an id, an empty
                # one, on which openai-python fails. A comment is complete without it.
                is_comment = frame.startswith(b":") and self.tail.endswith(b"\n")
                frame = frame[:-1] if is_comment else b""
            if frame and not self.connection.output:
                if not self.status:
                    self.start(200, SSE_HEADERS.items())
                tail = self.tail
                self.send(self._frame(frame))
                self.tail = tail
        except ClientDisconnected:
            self.request.cancellation.cancel()
        finally:
            self.lock.release()

    def _frame(self, data: bytes, end: bytes = b"") -> bytes:
        """Frame a part of the body; put the head before the first one, and ``end`` behind."""
        head, self.head = self.head, b""
        if data:
            self.bytes_sent += len(data)
            self.tail = data if len(data) > 3 else (self.tail + data)[-4:]
            if self.ping_frame and not self.has_event_id:
                # Streams with IDs have one in each event, and a whole burst takes long to search.
                self.has_event_id = data.find(b"id:", 0, 1024) >= 0
            if self.request.head.method == "HEAD":
                data = b""
            elif self.chunked:  # only if there is data: a chunk of length 0 would end the body
                return b"".join((head, b"%x\r\n" % len(data), data, b"\r\n", end))
        return head + data + end


class StreamRelay:
    """Relays one response: upstream -> decoder -> dialect -> client. Loop thread.

    A client that reads slowly pauses its upstream (back-pressure). After the response is complete
    the client may send its next request, while the upstream's message is read to its end: only then
    can the upstream connection be reused.
    """

    paused = client_done = upstream_done = False
    fast_path: Any = None  # unframe, parse, encode; (): impossible; None: not known yet

    def __init__(self, responder: CallResponder) -> None:
        self.responder, self.request, self.call = responder, responder.request, responder.call
        self.exchange, self.dialect = responder.exchange, responder.dialect
        self.writer, self.connection = responder.writer, responder.request.connection
        self.loop = self.connection.loop
        self.stream: EventStream = self.exchange.response
        self.upstream, self.scope = self.stream.response.sock, self.stream.response.scope
        # Bytes that have been decrypted but not read, if the upstream uses TLS.
        self.tls_pending: Any = getattr(self.upstream, "pending", None)
        self.idle_timeout = self.stream.response.timeouts.idle
        self.buffered: list[Event] = []  # of a response that is not streamed
        if self.dialect.keeps_text or not self.call.stream:
            self.stream.byte_budget = MAX_BUFFERED_BODY * (4 if self.call.stream else 1)

    def start(self) -> None:
        """Take over from the worker that has sent the request to the upstream."""
        self.recv_flags = self.stream.response.make_nonblocking()
        if self.connection.state is CLOSED:
            self.on_client_disconnect()
            return
        self.request.relay, self.writer.send = self, self.connection.send
        self._add_upstream()

    def on_upstream_tls(self) -> None:
        """Handle a readable upstream socket with TLS."""
        self.on_upstream()
        while not self.upstream_done and not self.paused and self.tls_pending():
            self.on_upstream()  # decrypted bytes don't make the socket readable again

    def on_client_disconnect(self) -> None:
        """Release the upstream after the client has disconnected."""
        self.client_done = True
        self._release()
        self.loop.call_soon_threadsafe(self.connection.end_request)

    def abort(self) -> None:
        """Close the upstream, and the client if it still waits."""
        self._release()
        if not self.client_done:
            self.connection.disconnect()

    def on_upstream(self) -> None:
        """Read once from the readable upstream, and write once to the client."""
        stream = self.stream
        try:
            data = self.upstream.recv(RECV_SIZE, self.recv_flags)
            if self.fast_path:
                # Nearly every read of a live stream is one chunk that holds one token. To relay it
                # without events saves a quarter of its CPU time.
                unframe, parse, encode = self.fast_path
                payload = unframe(data)
                token = payload and parse(payload)
                if token:
                    self.scope.deadline = self.loop.now + self.idle_timeout
                    if not self.writer.write_chunk(encode(token)):
                        self._pause()
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
            end = self.loop.now + stream.response.timeouts.idle  # less once it is complete
            self.scope.deadline = min(end, self.scope.deadline) if stream.complete else end

    def _choose_fast_path(self) -> None:
        body, decoder = self.stream.response.body, self.stream.decoder
        is_relayed = self.call.attempt.content_type is not None
        encode = bytes if is_relayed else self.dialect.text_frame and self.dialect.token_frame
        usable = decoder.has_fast_path and encode and body.chunked and self.writer.chunked
        usable = usable and self.stream.response.content is None
        self.fast_path = (body.complete_chunks, decoder.fast_path, encode) if usable else ()

    def _deliver(self, events: list[Event]) -> None:
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
            self._end_response(frames)

    def _is_buffered(self) -> bool:
        is_relayed = self.call.attempt.content_type is not None
        return not self.call.stream or is_relayed and isinstance(self.stream.decoder, BufferedBody)

    def _end_response(self, frames: bytes) -> None:
        """Send the last frames, and let the connection read its next request."""
        self.client_done, self.fast_path = True, ()
        self.responder.finish(frames)
        self.request.relay = self.request.source = None
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
            self.abort()
        elif self.exchange.committed:
            frames = self.responder.error_trailer(error)
            self._release(error)
            self._end_response(frames)
        else:
            self.upstream_done = True
            self.loop.remove(self.upstream)
            self.request.relay, self.writer.send = None, self.connection.enqueue
            self.responder.resume(error)

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
        callback = self.on_upstream_tls if self.tls_pending else self.on_upstream
        try:
            self.loop.add(self.upstream, callback, self.abort)
        except OSError as error:  # select() has no room for it
            self.stream.on_network_error(error)
            self._fail(self.stream.error or error)
            return
        if self.tls_pending and self.tls_pending():
            self.on_upstream_tls()

    def _release(self, error: APIError | None = None) -> None:
        """Return or close the upstream connection, and record its result. Idempotent."""
        if not self.upstream_done:
            self.upstream_done = True
            self.loop.remove(self.upstream)
            self.exchange.close(error)


# == 18. limits ===============================================================================
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
            limit = f"the limit of the key {self.name!r} is {rate} per minute"
            raise bad_request(f"'n' must be at most {rate}: {limit}.", "n")
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
        message = f"Too many requests: the limit of the key {self.name!r} is {limit}."
        return APIError(429, message, retry_after=seconds)

    def release(self) -> None:
        with self.lock:
            self.in_flight -= 1

    def status(self) -> dict[str, Any]:
        """Return the key's entry in /status."""
        counts = {"in_flight": self.in_flight, "requests": self.requests}
        return {"name": self.name, **counts, "refused": self.rejected}


# {name: (help, label, ...)}; a counter's name ends in "_total", and no other one. Label values come
# from ROUTES, the settings and the upstreams' model lists, never from requests: clients could
# otherwise create any number of series.
# fmt: off
METRICS: dict[str, tuple[str, ...]] = {
    "akashproxy_requests_total": ("Completed requests.", "route", "status", "controller"),
    "akashproxy_requests_in_flight": ("Model calls and images in progress.",),
    "akashproxy_requests_waiting": ("Model calls queued for a controller.",),
    "akashproxy_request_duration_seconds": (
        "Time from the first byte of a model call to the end of its response.", "controller"),
    "akashproxy_time_to_first_token_seconds": (
        "Time from the first byte of a model call to the first event of its stream.", "controller"),
    "akashproxy_time_per_output_token_seconds": (
        "Time of a stream after its first event, per further token.", "controller"),
    "akashproxy_streams_broken_off_total": (
        "Responses that failed after they had begun.", "controller"),
    "akashproxy_prompt_tokens_total": ("Prompt tokens, where upstreams report them.", "controller"),
    "akashproxy_completion_tokens_total": (
        "Completion tokens, where upstreams report them.", "controller"),
    "akashproxy_estimated_prompt_tokens_total": (
        "Prompt tokens, estimated where upstreams report none.", "controller"),
    "akashproxy_estimated_completion_tokens_total": (
        "Completion tokens, estimated where upstreams report none.", "controller"),
    "akashproxy_model_requests_total": (
        "Completed model calls, by a model that upstreams list.", "model"),
    "akashproxy_model_tokens_total": ("Tokens, by a model that upstreams list.", "model", "type"),
    "akashproxy_model_estimated_tokens_total": (
        "Estimated tokens, by a model that upstreams list.", "model", "type"),
    "akashproxy_upstream_requests_total": ("Attempts, by their outcome.", "controller", "outcome"),
    "akashproxy_failovers_total": ("Failovers to another controller.",),
    "akashproxy_controller_rests_total": ("Cool-downs of a controller.", "controller"),
    "akashproxy_controller_resting": ("1 while a controller is cooling down.", "controller"),
    "akashproxy_controller_rest_seconds": (
        "Time until a controller's cool-down ends.", "controller"),
    "akashproxy_session_renewals_total": ("Sessions obtained from Akash Chat.", "controller"),
    "akashproxy_login_active": (
        "1 if the login in a controller's cookie is valid, 0 if it has ended.", "controller"),
    "akashproxy_key_requests_total": ("Model calls of a key.", "key"),
    "akashproxy_key_refused_total": ("Model calls rejected by the limits of a key.", "key"),
    "akashproxy_key_in_flight": ("Model calls of a key in progress.", "key"),
    "akashproxy_key_tokens_total": ("Tokens used by a key.", "key", "type"),
    "akashproxy_key_estimated_tokens_total": ("Estimated tokens used by a key.", "key", "type"),
    "akashproxy_sent_bytes_total": ("Bytes sent in response bodies.",),
    "akashproxy_open_connections": ("Open client connections.",),
    "akashproxy_build_info": ("Always 1.", "version", "python"),
    "process_cpu_seconds_total": ("CPU time, user and system.",),
    "process_start_time_seconds": ("Start time, in seconds since 1970.",),
    "process_resident_memory_bytes": ("Memory in use (Linux).",),
    "process_open_fds": ("Open file descriptors (Linux).",),
    "process_max_fds": ("Limit of open file descriptors.",),
}
# fmt: on
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
BUCKETS = {  # upper bounds of each histogram's buckets, in seconds; then infinity
    "akashproxy_request_duration_seconds": _SECONDS,
    "akashproxy_time_to_first_token_seconds": _SECONDS,
    "akashproxy_time_per_output_token_seconds": (
        0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5,
    ),
}  # fmt: skip
MAX_MODEL_LABELS = 200  # models with series of their own; the others are counted as "other"


class Metrics:
    """Counters and histograms for /metrics. Any thread."""

    def __init__(self, server: Server) -> None:
        self.server, self.started_at, self.lock = server, time.time(), threading.Lock()
        self.counts: dict[tuple[Any, ...], float] = defaultdict(int)  # {(name, label, ...): number}
        for name, (_, *labels) in METRICS.items():
            if name.endswith("_total") and not labels:  # rate() needs a first value
                self.counts[name,] = 0
        self.models: set[str] = set()  # those with series of their own

    def add(self, request: "Request", now: float) -> None:
        """Count a completed request."""
        record, call, writer, counts = request.record, request.call, request.writer, self.counts
        controller, status = record.controller, writer.status or 499
        with self.lock:
            counts["akashproxy_requests_total", request.route.label, status, controller] += 1
            counts["akashproxy_sent_bytes_total",] += writer.bytes_sent
            if call is None:
                return
            counts["akashproxy_failovers_total",] += max(0, len(record.route) - 1)
            if record.broken_off:
                counts["akashproxy_streams_broken_off_total", controller] += 1
            model = self.model_label(call.model)
            counts["akashproxy_model_requests_total", model] += 1
            seconds = now - request.started_at
            self.observe("akashproxy_request_duration_seconds", controller, seconds)
            if call.stream and controller and is_event_stream(call.attempt.content_type):
                self._add_stream_times(request, now)
            if record.usage:
                self._add_tokens(request, record.usage, model)

    def _add_stream_times(self, request: "Request", now: float) -> None:
        """Add the durations of a stream to the histograms. The caller holds the lock."""
        record, usage = request.record, request.record.usage or {}
        controller, first = record.controller, record.first_token_at
        seconds = first - request.started_at
        self.observe("akashproxy_time_to_first_token_seconds", controller, seconds)
        tokens = usage.get("completion_tokens") or 0
        if tokens > 1 and not is_estimated(usage):
            seconds = (now - first) / (tokens - 1)
            self.observe("akashproxy_time_per_output_token_seconds", controller, seconds)

    def _add_tokens(self, request: "Request", usage: dict[str, Any], model: str) -> None:
        """Count a call's tokens. The caller holds the lock."""
        estimated, counts = "estimated_" * is_estimated(usage), self.counts
        for kind in ("prompt", "completion"):
            tokens = max(0, usage.get(f"{kind}_tokens") or 0)
            if tokens:
                controller = request.record.controller
                counts[f"akashproxy_{estimated}{kind}_tokens_total", controller] += tokens
                counts[f"akashproxy_model_{estimated}tokens_total", model, kind] += tokens
                if request.key is not None:
                    name = request.key.name
                    counts[f"akashproxy_key_{estimated}tokens_total", name, kind] += tokens

    def model_label(self, model: str) -> str:
        """Return the label of a model: its name if upstreams list it, else "other"."""
        if model not in self.models:
            if model not in self.server.pool.model_names or len(self.models) >= MAX_MODEL_LABELS:
                return "other"
            self.models.add(model)
        return model

    def observe(self, name: str, controller: str, seconds: float) -> None:
        """Add a duration to a histogram. The caller holds the lock."""
        self.counts[name, controller, bisect.bisect_left(BUCKETS[name], seconds)] += 1
        self.counts[name, controller, "sum"] += seconds

    def snapshot(self) -> dict[tuple[Any, ...], float]:
        """Return all metrics: {(name, label, ...): number}."""
        server = self.server
        server.pool.refresh_models_async()  # for the labels
        with self.lock:
            metrics = dict(self.counts)
        metrics["akashproxy_requests_in_flight",] = server.running_calls()
        metrics["akashproxy_requests_waiting",] = len(server.pool.queue)
        metrics["akashproxy_open_connections",] = len(server.connections)
        for upstream in server.pool.upstreams:
            for (name, *labels), value in upstream.metrics(server.pool.clock()).items():
                metrics[(name, upstream.name, *labels)] = value
        for key in server.keys:
            metrics["akashproxy_key_requests_total", key.name] = key.requests
            metrics["akashproxy_key_refused_total", key.name] = key.rejected
            metrics["akashproxy_key_in_flight", key.name] = key.in_flight
        metrics["akashproxy_build_info", __version__, "%d.%d.%d" % sys.version_info[:3]] = 1
        metrics["process_start_time_seconds",] = self.started_at
        metrics.update(process_metrics())
        return metrics


def process_metrics() -> dict[tuple[str], float]:
    """Return the process_* metrics that this system offers."""
    metrics: dict[tuple[str], float] = {("process_cpu_seconds_total",): time.process_time()}
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY:
            metrics["process_max_fds",] = limit
        metrics["process_open_fds",] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
        metrics["process_resident_memory_bytes",] = pages * resource.getpagesize()
    return metrics


def prometheus_text(metrics: dict[tuple[Any, ...], float]) -> bytes:
    """Format metrics as Prometheus' text format (0.0.4)."""
    series: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in METRICS}
    for (name, *labels), value in metrics.items():
        series[name][tuple(map(str, labels))] = value
    lines = []
    for name, (help, *names) in METRICS.items():
        other_type = "counter" if name.endswith("_total") else "gauge"
        metric_type = "histogram" if name in BUCKETS else other_type
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {metric_type}"]
        samples = sorted(series[name].items())
        if name not in BUCKETS:
            lines += [sample(name, zip(names, key), value) for key, value in samples]
            continue
        for key, group in itertools.groupby(samples, key=lambda item: item[0][:-1]):
            buckets = {bucket: value for (*_, bucket), value in group}
            lines += histogram_lines(name, list(zip(names, key)), buckets)
    return "\n".join([*lines, ""]).encode()


def histogram_lines(
    name: str, labels: list[tuple[str, str]], buckets: dict[str, float]
) -> Iterator[str]:
    """Yield the sample lines of one histogram; its buckets are cumulative."""
    count: float = 0
    for index, bound in enumerate([*map(str, BUCKETS[name]), "+Inf"]):
        count += buckets.get(str(index), 0)
        yield sample(f"{name}_bucket", [*labels, ("le", bound)], count)
    yield sample(f"{name}_sum", labels, buckets["sum"])
    yield sample(f"{name}_count", labels, count)


def sample(name: str, labels: Iterable[tuple[str, str]], value: float) -> str:
    """Format one sample line."""
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    text = ",".join(f'{label}="{text.translate(escapes)}"' for label, text in labels)
    return f"{name}{{{text}}} {value}" if text else f"{name} {value}"


# == 19. server ===============================================================================
# http.server's classes, on the event loop. Knows no upstreams.

# Paths that need no token: a browser sends none with an address that was typed in. The page holds
# no secrets, and its own API requests carry the token.
PUBLIC_PATHS = ("/", "/health")

BODILESS_METHODS = ("GET", "HEAD", "OPTIONS", "DELETE")  # their bodies are not waited for

SERVER_NAME = f"akashproxy/{__version__}"
CORS_ANY = (
    "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: "
    "x-request-id, retry-after, x-should-retry, x-akashproxy-context-overflow, "
    "x-akashproxy-ignored, x-akashproxy-route\r\n"
)
_UNPRINTABLE = re.compile(r"[^ -~]")  # not allowed in a header
_PARAM_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_STATUS_LINES = {int(status): f"HTTP/1.1 {status:d} {status.phrase}" for status in http.HTTPStatus}

# Request headers that a relayed request keeps; all others stay here, tokens and cookies above all.
FORWARDED_HEADERS = frozenset(
    ("accept", "openai-beta", "anthropic-version", "anthropic-beta", "traceparent", "tracestate")
)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C

LAME_DUCK_SECONDS = 1.0  # idle connections stay open on shutdown, for requests in transit

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


def is_event_stream(content_type: str | None) -> bool:
    """Return whether a stream's response is SSE. None: it is encoded here, so it is."""
    return content_type is None or content_type.startswith("text/event-stream")


@functools.lru_cache(maxsize=64)
def header_lines(*headers: tuple[str, str]) -> str:
    """Return the lines of headers; what is not printable ASCII becomes "?"."""
    lines = [f"{name}: {value}" for name, value in headers]
    return "".join([_UNPRINTABLE.sub("?", line) + "\r\n" for line in lines])


@functools.lru_cache(maxsize=2)
def server_date_headers(second: int) -> str:
    """Return the Server and Date headers for a Unix time."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
    return f"Server: {SERVER_NAME}\r\nDate: {date}\r\n"


# -- the gate: tokens, origins, hosts

_AUTHORITY = re.compile(r"[a-z0-9._:\[\]-]+")


@functools.lru_cache(maxsize=None)
def own_methods(handler: Any) -> list[str]:
    """Return the methods that a handler subclass handles, on paths of its own."""
    names = [name for name in dir(handler) if name.startswith("do_")]
    own = [name for name in names if getattr(handler, name) is not getattr(Handler, name, None)]
    return [name[len("do_") :] for name in own]


def check_head(request: Request, decoder: BodyDecoder) -> None:
    """Set the request's route and key; APIError if it is rejected. Loop thread.

    Checks path, origin, token, method and declared size before a byte of the body is buffered.
    """
    settings, server = request.settings, request.server
    request.head = head = strip_path(request.head, settings.path_prefix)
    request.route = route = find_route(head.method, head.path)
    check_page(request)  # after the route, which decides on the form of its error
    if head.method == "OPTIONS":  # a preflight carries no token
        return
    public_metrics = head.path == "/metrics" and settings.metrics == "public"
    if settings.needs_token and head.path not in PUBLIC_PATHS and not public_metrics:
        authorize(request)
    if head.method in own_methods(server.RequestHandlerClass):
        return
    if not route.targets:
        raise APIError(404, f"There is no {head.path[:200]!r} here.", code="not_found")
    if route.target(head.method) is None:
        raise APIError(405, f"{head.method} is not allowed here.", code="method_not_allowed")
    if head.method in BODILESS_METHODS:
        return
    # The declared size does not count yet: otherwise clients that declare much and send nothing
    # would lock out all others.
    size = decoder.remaining
    check_body(server, size, size if size > len(request.connection.input) else 0)
    expect = head.headers.get("expect", "100-continue")
    if request.body_unread and head.http_minor == "1" and expect.lower() != "100-continue":
        raise APIError(417, "Only 'Expect: 100-continue' is supported.")


def is_health_check(request: Request) -> bool:
    """Return whether the loop may handle the request: /health, unless overridden.

    It never blocks, takes a third of the CPU time there, and works if no thread can be started.
    """
    server, is_health = request.server, request.route.targets.get("GET") is get_health
    return is_health and type(server) is Server and server.RequestHandlerClass is Handler


def check_page(request: Request) -> None:
    """Reject browser requests from foreign pages; APIError 403.

    Any page can send requests from its visitor's browser. Without a token, only Origin and Host
    distinguish them from requests of other clients; a token is sufficient proof.
    """
    settings, headers = request.settings, request.head.headers
    host, origin = headers.get("host", ""), headers.get("origin")
    if origin and not origin_allowed(origin, host, settings):
        message = (
            f"Pages from the origin {origin[:200]!r} may not use this server. "
            "Allowed origins are listed in CORS_ORIGINS."
        )
        raise APIError(403, message, code="origin_not_allowed", retry=False)
    is_open = request.server.is_loopback and not settings.needs_token
    if is_open and not host_allowed(host, settings):
        message = (
            f"The host name {host[:200]!r} is not allowed. "
            "Set PUBLIC_URL to allow it, or BEARER_TOKEN to allow any."
        )
        raise APIError(403, message, code="host_not_allowed", retry=False)


def authorize(request: Request) -> None:
    """Check the token, and set the request's key; APIError 401."""
    # Imported here: it loads OpenSSL's hashes, which a server without tokens does not need.
    from hmac import compare_digest

    headers = request.head.headers
    scheme, *bearer = headers.get("authorization", "").split(None, 1) or [""]
    tokens = [headers.get("x-api-key"), headers.get("api-key")]
    tokens += bearer if scheme.lower() == "bearer" else []
    sent = [token.encode("utf-8", "replace") for token in tokens if token]
    known: list[tuple[str, Any]] = [(key.options.key, key) for key in request.server.keys]
    known += [(token, None) for token in request.settings.bearer_token]
    # Any accepted token is sufficient. All are compared, and in constant time, so that the
    # response time reveals nothing about them.
    accepted = [
        key for token, key in known for data in sent if compare_digest(data, token.encode())
    ]
    if not sent:
        raise APIError(401, "A token is needed: send it as 'Authorization: Bearer TOKEN'.")
    if not accepted:
        raise APIError(401, "Incorrect API key provided: this server does not know the token.")
    request.key = next(filter(None, accepted), None)


def strip_path(head: Head, prefix: str) -> Head:
    """Return the head with its path below PATH_PREFIX; APIError 404 if outside."""
    path = head.path
    if prefix and not path.startswith(prefix + "/"):
        raise APIError(404, f"There is no {path[:200]!r} here.", code="not_found")
    path = path[len(prefix) :]
    if path.endswith("/") and path[-2:-1] not in ("", "/"):
        path = path[:-1]  # "/v1/models/" is "/v1/models"
    return head if path == head.path else head._replace(path=path)


# -- reverse proxies. Their headers are used for links and the log, but never by the gate: a page
# that rebinds its domain to 127.0.0.1 may send any header, and comes from a trusted address. To
# foreign pages the headers are of no use: they need a preflight for them, which the gate rejects.

_FORWARDED = {
    "proto": re.compile("https?"),
    "host": re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}"),
    "prefix": re.compile(r"(?:/[A-Za-z0-9._~-]+)*/?"),
}


@functools.lru_cache(maxsize=1024)
def is_trusted(address: str, networks: tuple[str, ...]) -> bool:
    """Return whether a peer is in one of the networks; False if it has no IP address."""
    try:
        ip: Any = ipaddress.ip_address(address)
    except ValueError:
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip  # ::ffff:127.0.0.1, on a socket for both families
    return any(ip in ipaddress.ip_network(network) for network in networks)


def forwarded(request: Request, name: str) -> str:
    """Return a trusted proxy's X-Forwarded-Proto, -Host or -Prefix."""
    value = request.head.headers.get("x-forwarded-" + name, "").partition(",")[0].strip()
    peer = request.connection.client_address[0]
    trusted = value and is_trusted(peer, request.settings.trusted_proxies)
    return value if trusted and _FORWARDED[name].fullmatch(value) else ""


def client_address(request: Request) -> str:
    """Return the client's IP: the last in X-Forwarded-For that isn't a trusted proxy."""
    address: str = request.connection.client_address[0]
    forwarded_for = request.head.headers.get("x-forwarded-for")
    if not forwarded_for:
        return address
    hops = [hop.strip() for hop in forwarded_for.rsplit(",", 20)[-20:] if hop.strip()]
    with contextlib.suppress(ValueError):  # a hop that is not an IP address
        while hops and is_trusted(address, request.settings.trusted_proxies):
            hop = hops.pop()
            host = hop if hop.count(":") > 1 and hop[:1] != "[" else host_of(hop).strip("[]")
            address = str(ipaddress.ip_address(host))
    return address


def own_url(request: Request) -> str:
    """Return this server's URL as the client knows it."""
    settings = request.settings
    host = forwarded(request, "host") or request.head.headers.get("host")
    url = settings.public_url or request.server.url
    if host and not settings.public_url:
        prefix = forwarded(request, "prefix").rstrip("/")
        url = f"{forwarded(request, 'proto') or 'http'}://{host}{prefix}"
    has_prefix = urllib.parse.urlsplit(url).path.endswith(settings.path_prefix)
    return url if has_prefix else url + settings.path_prefix


def acquire_key(request: Request, key: KeyLimiter, call: Call) -> None:
    """Apply the limits of the request's key to a call; APIError 429. Worker thread."""
    is_image = call.original.path.startswith("/v1/images/")
    key.acquire(call.image_count or (images_requested(call.original) if is_image else 1))
    request.counted = True
    call.key_name = key.name
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
    if "*" in settings.cors_origins or not settings.cors_origins and settings.needs_token:
        return CORS_ANY
    origin = headers.get("origin", "")
    if origin and origin_allowed(origin, headers.get("host", ""), settings):
        return f"Vary: Origin\r\n{CORS_ANY.replace('*', origin)}"
    return "Vary: Origin\r\n"


def host_of(authority: str) -> str:
    """Return the host of HOST[:PORT] in lower case, with the brackets of IPv6."""
    host, colon, port = authority.lower().rpartition(":")
    return host if colon and port.isdigit() else authority.lower()


@functools.lru_cache(maxsize=64)
def is_local(authority: str) -> bool:
    """Return whether a host is localhost, a subdomain of it, or a loopback address."""
    host = host_of(authority)
    if not _AUTHORITY.fullmatch(host):
        return False
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_allowed(authority: str, settings: Settings) -> bool:
    """Return whether a server on loopback accepts a Host.

    DNS rebinding: a page's domain is made to resolve to 127.0.0.1, so its requests are same-origin
    and only Host shows the foreign domain. Accepted are local and configured names, and names
    without a dot, which no public domain is.
    """
    if is_local(authority):
        return True
    host, own = host_of(authority), split_address(settings.server_address)[0].lower()
    is_own = host in (own, urllib.parse.urlsplit(settings.public_url).hostname)
    return is_own or "." not in host and ":" not in host


def origin_allowed(origin: str, host: str, settings: Settings) -> bool:
    """Return whether pages of an origin may use the server.

    Its own page and CORS_ORIGINS may. If that is empty: all origins if a token is required,
    otherwise those of this machine.
    """
    scheme, _, authority = origin.lower().partition("://")
    is_web = scheme in ("http", "https")
    if is_web and authority == host.lower() != "":
        return True
    public_url = settings.public_url.lower()
    if public_url and f"{origin.lower()}/" == urllib.parse.urljoin(public_url, "/"):
        return True
    if settings.cors_origins:
        return "*" in settings.cors_origins or origin.lower() in settings.cors_origins
    return settings.needs_token or is_web and is_local(authority)


class ResponseFile(io.RawIOBase):
    """A handler's ``wfile``: write() sends a part of the response body. Worker thread."""

    def __init__(self, writer: ResponseWriter) -> None:
        super().__init__()
        self.writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.writer.connection.wait_for_room()  # before: the last part is not waited for
        self.writer.write(bytes(data))
        return len(data)


class CallResponder:
    """Responds to a model call in the client's dialect, with failover.

    Worker thread; loop thread while a StreamRelay has the response.
    """

    def __init__(self, handler: Handler, exchange: Exchange) -> None:
        self.request, self.run, self.dialect = handler.request, handler.run, handler.dialect
        self.exchange, self.call, self.writer = exchange, exchange.call, self.request.writer
        loop = self.request.connection.loop
        exchange.resume = functools.partial(loop.call_soon_threadsafe, self.resume)
        if self.call.stream:
            self.writer.ping_frame = self.dialect.ping_frame

    def attempt(self, error: APIError | None = None) -> bool:
        """Try controllers, after ``error`` the next ones, until one responds. Worker.

        Returns True if the response goes on elsewhere (relayed by the loop, or the call is queued),
        False if it is complete; raises APIError if no controller responds.
        """
        exchange = self.exchange
        if error is not None:
            exchange.fail_over(error)
        try:
            if exchange.attempt():
                relay = StreamRelay(self)
                # Last: from here on the request belongs to the loop, which may relay already.
                relay.loop.call_soon_threadsafe(relay.start)
                return True
        except Queued:
            return True  # resume() continues
        try:
            self._drain(exchange.events())
        except APIError as failure:
            if not exchange.committed:
                return self.attempt(failure)
            self.finish(self.error_trailer(failure))
            exchange.close(failure)
        return False

    def resume(self, error: APIError | None = None) -> None:
        """Continue on a worker, after the queue or an early error. Loop thread."""
        task = functools.partial(self.run, self.attempt, error)
        self.request.connection.submit(self.request, task)

    def start_stream(self) -> bytes:
        """Begin a streamed response; returns its opening frames."""
        content_type = self.call.attempt.content_type
        headers = SSE_HEADERS if is_event_stream(content_type) else {}
        self._start({**headers, "Content-Type": content_type} if content_type else headers)
        return b"" if content_type else self.dialect.opening_frames()

    def start_buffered(self, events: list[Event]) -> bytes:
        """Begin a response that is not streamed; returns its body."""
        content_type = self.call.attempt.content_type
        if content_type is None:
            answer = fold(map(self.dialect.count, events))
            content_type, data = "application/json", to_json(self.dialect.response_body(answer))
        else:
            data = self.dialect.encode(events)
        self._start({"Content-Type": content_type}, len(data))
        return data

    def _start(self, headers: dict[str, str], length: int | None = None) -> None:
        """End failover; begin the response, unless a ping has begun it."""
        self.exchange.commit()
        record, call = self.request.record, self.call
        record.first_token_at, record.controller = time.monotonic(), self.exchange.upstream.name
        if call.model != call.requested_model:
            record.answered_model = call.model
        with self.writer.lock:
            if not self.writer.status:
                headers = {**headers, **call_headers(self.request)}
                self.writer.start(call.attempt.status, headers.items(), length)

    def error_trailer(self, error: APIError) -> bytes:
        """Return the frames that end a response with an error; b"" if its format has none."""
        log.warning("%s: broken off: %s", self.request.id, error.message)
        self.request.record.broken_off = True
        if is_event_stream(self.call.attempt.content_type):
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
            self.finish(body)
            return
        first = next(events)
        frames = self.start_stream()
        for event in itertools.chain([first], events):
            frames += self.dialect.encode([event])
            if isinstance(event, Finish):
                break
            self.writer.connection.wait_for_room()
            self.writer.write(frames)
            frames = b""
        self.finish(frames)

    def finish(self, frames: bytes) -> None:
        """End the response with its last frames."""
        self.request.record.usage = self.dialect.usage
        self.writer.finish(frames)


def call_headers(request: Request) -> dict[str, str]:
    """Return the headers on a call's attempts, its ignored parameters and its length."""
    route, call = request.record.route, request.call
    headers = {"X-Akashproxy-Route": ", ".join(route)} if route else {}
    if call is None:
        return headers
    if call.attempt.overflow:
        headers["X-Akashproxy-Context-Overflow"] = call.attempt.overflow
    translated = call.attempt.content_type is None
    ignored = [*call.attempt.ignored_params, *(call.untranslated if translated else ())]
    names = [name for name in dict.fromkeys(ignored[:100]) if _PARAM_NAME.fullmatch(name)]
    if names:
        headers["X-Akashproxy-Ignored"] = ", ".join(names[:20])
    return headers


class Handler(http.server.BaseHTTPRequestHandler):
    """Handles one request, as in http.server. Worker thread; /health: loop thread.

    A subclass may define do_GET() etc. and use send_response(), send_header(), end_headers(),
    send_error(), rfile and wfile. Differences from http.server:

    - a handler is created for each complete request, not for each connection;
    - ``request`` is a Request, ``connection`` a Connection;
    - ``path`` is percent-decoded and without PATH_PREFIX, but with its query;
    - the response body is framed here: chunked unless a Content-Length is sent;
    - errors are sent in the client's dialect, also by send_error();
    - a do_ method that returns True leaves the response to the loop.
    """

    server: Server
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
    rfile: Any = functools.cached_property(lambda self: io.BytesIO(self.request.body))
    wfile: Any = functools.cached_property(lambda self: ResponseFile(self.request.writer))

    @functools.cached_property
    def requestline(self) -> Any:  # type: ignore[override]
        return f"{self.command} {self.path} {self.request_version}"

    @functools.cached_property
    def headers(self) -> Any:  # type: ignore[override]
        headers = http.client.HTTPMessage()
        for name, value in self.request.head.headers.items():
            headers[name] = value
        return headers

    def run(self, step: Callable[..., Any], *args: Any) -> None:
        """Run a step and send the error it raises; end the request unless it returns True."""
        continues = False
        try:
            continues = bool(step(*args))
        except APIError as error:
            self.send_api_error(error)
        except ClientDisconnected:
            pass  # the access log says 499
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            message = "Internal error. The log has the details."
            self.send_api_error(APIError(500, message, retry=False))
        if not continues:
            self.server.loop.call_soon_threadsafe(self.request.connection.end_request)

    def handle_one_request(self) -> Any:
        self.parse_request()
        writer, method = self.request.writer, getattr(self, "do_" + self.command, self.dispatch)
        if method():
            return True
        if not writer.status:
            raise APIError(500, f"{type(self).__name__}.do_{self.command} sent no response.")
        if not writer.finished:
            writer.finish()
        if self.close_connection:  # set by a subclass after the head
            self.request.keep_alive = False
        return False

    def parse_request(self) -> bool:
        """Set the attributes from the parsed head; APIError if the request was rejected."""
        request = self.request
        self.command, path, query, http_minor, headers = request.head
        self.path = f"{path}?{query}" if query else path
        self.request_version = "HTTP/1.1" if http_minor == "1" else "HTTP/1.0"
        self.close_connection = not request.keep_alive
        target = request.route.targets.get("POST")
        if isinstance(target, type):
            self.dialect = target
        elif "anthropic-version" in headers:
            self.dialect = Messages
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
            headers["Access-Control-Allow-Methods"] = allow
            headers["Access-Control-Max-Age"] = "86400"
            requested = self.headers.get("access-control-request-headers", "")
            names = list(filter(_TOKEN.fullmatch, re.split(r"[\s,]+", requested)))
            if names:
                headers["Access-Control-Allow-Headers"] = ", ".join(names)
        self.request.writer.respond(204, b"", headers)

    def dispatch(self) -> Any:
        """Call the route's function, or respond to a model call; returns as do_GET()."""
        target = self.request.route.target(self.command)
        if target is None:  # the gate leaves the paths to a subclass, which calls super().do_GET()
            path = self.request.head.path
            raise APIError(404, f"There is no {path[:200]!r} here.", code="not_found")
        if not isinstance(target, type):
            return target(self)
        dialect, request = self.parse_call(target), self.request
        request.record.model = dialect.call.model
        request.begin_call(dialect.call)
        dialect.call.client = request.key.name if request.key else client_address(request)
        if request.key is not None:
            acquire_key(request, request.key, dialect.call)
        self.dialect = dialect
        request.source = exchange = Exchange(self.server.pool, dialect.call)
        request.record.route = exchange.route  # the list itself, which grows
        return CallResponder(self, exchange).attempt()

    def parse_call(self, dialect_class: Any) -> Any:
        """Parse the body into a dialect with its call; APIError 400 if it is invalid."""
        head = self.request.head
        headers = head.headers
        data, content_type = self.request.body, headers.get("content-type", "")
        try:
            if dialect_class is Passthrough:
                dialect = Passthrough(data, content_type)
            else:
                base_url = functools.partial(own_url, self.request)
                dialect = dialect_class(from_json(data), base_url)
        except ValueError as error:
            raise bad_request(f"The body is not valid JSON: {error}.") from None
        call = dialect.call
        call.original.path, call.original.raw_body = head.path, data
        dialect.prepare()
        query = remove_model_params(head.query) if head.query else ""
        if query:
            call.original.query = "?" + query
        call.original.headers = {
            name.title(): headers[name] for name in FORWARDED_HEADERS.intersection(headers)
        }
        if call.original.body:
            check_names(call.original.body)
            is_marked = max(map(data.find, OWN_MARKS)) >= 0
            if is_marked:
                call.original.body = without_own_marks(call.original.body)
            # Letters may be escaped, as in "mod\u0065l".
            has_escaped_letters = max(data.find(b"\\u006"), data.find(b"\\u004")) >= 0
            call.original.is_changed = is_marked or has_escaped_letters
        return dialect

    # -- responses

    def send_response(self, code: int, message: str | None = None) -> None:
        """Begin a response; ``message`` is ignored, the standard phrase is sent."""
        self.response: dict[str, Any] = {"status": int(code), "headers": []}

    send_response_only = send_response

    def send_header(self, keyword: str, value: Any) -> None:
        """Add a header; ValueError if it contains CR, LF or NUL (header injection)."""
        if re.search("[\r\n\0]", f"{keyword}{value}"):
            raise ValueError("a header must not contain CR, LF or NUL")
        if keyword.lower() == "connection":
            self.close_connection = str(value).lower() == "close"
        elif keyword.lower() == "content-length":
            self.response["length"] = int(value)
        else:
            self.response["headers"].append((keyword, str(value)))

    def end_headers(self) -> None:
        """Begin the body, which is chunked without a Content-Length."""
        status, self.request.keep_alive = self.response["status"], not self.close_connection
        if status in (204, 304) or status < 200:
            self.response.setdefault("length", 0)
        self.request.writer.start(**self.response)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """Send an error in the client's dialect."""
        text = message or http.HTTPStatus(code).phrase
        self.send_api_error(APIError(code, f"{text}: {explain}" if explain else text))

    def send_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.request.writer.respond(status, to_json(value), headers)

    def send_api_error(self, error: APIError) -> None:
        """Send an error in the client's dialect, also at the end of a stream."""
        writer, parsed = self.request.writer, isinstance(self.dialect, Dialect)
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
                headers.update(call_headers(self.request))
                self.send_json(self.dialect.status(error), self.dialect.error_body(error), headers)

    def send_parts(self, parts: Iterator[bytes]) -> bool:
        """Send parts of the body; True if it goes on once the client has read them."""
        writer, connection = self.request.writer, self.connection
        task = functools.partial(self.run, self.send_parts, parts)
        resume = functools.partial(connection.submit, self.request, task)
        try:
            for data in parts:
                writer.write(data)
                if len(connection.output) >= connection.HIGH_WATER:
                    wait = functools.partial(connection.call_when_drained, resume)
                    connection.loop.call_soon_threadsafe(wait)
                    return True
            writer.finish()
        except APIError as error:
            log.warning("%s: an image broke off: %s", self.request.id, error.message)
            writer.break_off()
        return False

    def log_message(self, format: str, *args: Any) -> None:
        log.info(format, *args)


# -- targets of ROUTES: they send the response, or raise the APIError to send


def get_page(handler: Handler) -> None:
    if handler.request.settings.page == "off":
        raise APIError(404, "The page is turned off.", code="not_found")
    handler.request.writer.respond(200, *page())


HEALTHY = to_json({"status": "ok", "message": "akashproxy is running"})
DRAINING = {"status": "draining", "message": "akashproxy is stopping"}


def get_health(handler: Handler) -> None:
    """Send 200, or 503 while the server is stopping, for load balancers."""
    if handler.server.draining:
        handler.send_json(503, DRAINING, {"Retry-After": "5"})
    else:
        handler.request.writer.respond(200, HEALTHY, {"Content-Type": "application/json"})


def get_status(handler: Handler) -> None:
    server = handler.server
    status = {
        "status": "draining" if server.draining else "ok",
        "message": "akashproxy is running",
        "version": __version__,
        "uptime_seconds": int(time.monotonic() - server.started_at),
        "controllers": server.pool.status(),
        "keys": [key.status() for key in server.keys],
    }
    handler.send_json(200, status)


def get_metrics(handler: Handler) -> None:
    if handler.request.settings.metrics == "off":
        raise APIError(404, "Metrics are turned off.", code="not_found")
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    data = prometheus_text(handler.server.metrics.snapshot())
    handler.request.writer.respond(200, data, headers)


def allowed_models(handler: Handler) -> tuple[str, ...]:
    """Return the patterns of models that the client's key may use; (): all."""
    return handler.request.key.options.models if handler.request.key else ()


def models_of_key(handler: Handler) -> list[dict[str, Any]]:
    """Return the models that the client's key may use."""
    patterns = allowed_models(handler)
    return [model for model in handler.server.pool.models() if model_allowed(patterns, model["id"])]


def get_models(handler: Handler) -> None:
    handler.send_json(200, handler.dialect.model_list(models_of_key(handler)))


def get_model(handler: Handler) -> None:
    requested = handler.request.route.remainder
    models = {model["id"]: model for model in models_of_key(handler)}
    for name in handler.server.pool.resolve_alias(requested):
        if name in models:
            handler.send_json(200, handler.dialect.model_object({**models[name], "id": requested}))
            return
    call = Call({"model": requested})
    call.allowed_models = allowed_models(handler)
    raise handler.server.pool.unknown_model(call)


def get_response(handler: Handler) -> None:
    raise APIError(404, "Responses are not stored here.", code="not_found")


def get_image(handler: Handler) -> bool:
    """Relay an image; the upstream itself lets no other origin embed it."""
    request = handler.request
    if not IMAGE_NAME.fullmatch(request.route.remainder):
        raise APIError(404, "The image does not exist.", code="not_found")
    call = Call({"model": "image"})
    request.begin_call(call)
    request.source = response = handler.server.pool.image(request.route.remainder, call.scope)
    # private if there are tokens: a shared cache would serve the image without one
    cacheability = "private" if request.settings.needs_token else "public"
    headers = {
        "Content-Type": response.headers["content-type"],
        "Cache-Control": f"{cacheability}, max-age=31536000, immutable",
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    request.writer.start(200, headers.items())
    return handler.send_parts(response.iter_bytes() if handler.command == "GET" else iter(()))


# {path: {method: Dialect subclass, or function of a Handler}}. {} matches the path's remainder.
ROUTES: dict[str, dict[str, Any]] = {
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


@functools.lru_cache(maxsize=2)
def local_time(second: int) -> str:
    """Format a Unix time as the logging module does."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class LogFormat(logging.Formatter):
    """Formats log lines as text or JSON. Any thread."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style

    def format(self, record: logging.LogRecord) -> str:
        text = shorten(record.getMessage(), 4000)
        if not text.isprintable():  # a client must not be able to forge log lines
            escape = "unicode_escape"
            text = "".join([c if c.isprintable() else c.encode(escape).decode() for c in text])
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self.style == "text":
            milliseconds = int(record.created % 1 * 1000)
            return f"{local_time(int(record.created))},{milliseconds:03d} {record.levelname} {text}"
        from datetime import datetime  # only here: it takes memory, and text is the default

        time_of_day = datetime.fromtimestamp(record.created).astimezone()
        line = {
            "time": time_of_day.isoformat(timespec="milliseconds"),  # with the zone
            "level": record.levelname.lower(),
            **(getattr(record, "facts", None) or {"message": text}),
        }
        return _encode(line)


# -- the server

_TOO_MANY = APIError(503, "Too many clients are connected.", code="overloaded")
_FULL = to_json(Dialect.error_body(_TOO_MANY))
TOO_MANY_CLIENTS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class WorkerPool:
    """Worker threads: each task gets an idle or a new one. Any thread."""

    MAX_IDLE = 32

    def __init__(self) -> None:
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
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
        self.submit = self.workers.submit
        self.metrics = Metrics(self)
        self.keys = key_limiters(self.settings, [])
        self.body_bytes = 0  # of all request bodies in transit; loop thread
        self.connections: set[Connection] = set()  # changed on the loop thread only
        self.draining = self.accept_paused = False
        self.accepting_stopped = threading.Event()
        self.started_at = time.monotonic()
        host, port = split_address(self.settings.server_address)
        self.address_family, host = _family(host, port)
        try:
            super().__init__((host, port), RequestHandlerClass, bind_and_activate)
        except OSError as error:
            message = f"cannot listen on {self.settings.server_address}: {error.strerror or error}"
            raise ConfigError([message]) from None

    @property
    def url(self) -> str:
        """The base URL for clients on this machine."""
        host = "127.0.0.1" if self.server_name in ("0.0.0.0", "::") else self.server_name
        return f"http://{join_address(host, self.server_port)}{self.settings.path_prefix}"

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
        connection.set_deadline(self.settings.keepalive_timeout)
        if len(self.connections) > self.settings.max_connections:
            connection.reject()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the traceback of an exception in a handler. Worker thread."""
        log.exception("%s: a bug in akashproxy", getattr(request, "id", client_address))

    # -- running

    def start(self) -> Server:
        """Start the loop thread."""
        self.loop.add(self.socket, self.on_connection, self.on_connection)
        self.loop.start()
        return self

    def stop(self, grace: float | None = None) -> None:
        """Stop accepting, and give requests ``grace`` seconds to end."""
        self.draining = True
        if self.loop.is_alive():
            self.loop.call_soon_threadsafe(self.stop_accepting)
        else:
            self.stop_accepting()
        # Also in a second stop(). Otherwise: the first one schedules stop_accepting(); the second
        # one finds no connection and ends the loop; clients in the backlog are never accepted.
        self.accepting_stopped.wait()
        if not self.idle(self.settings.grace if grace is None else grace):
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
        end = time.monotonic() + seconds
        while self.connections and time.monotonic() < end:
            time.sleep(0.01)
        return not self.connections

    def running_calls(self) -> int:
        """Return the number of model calls and images in progress."""
        requests = [connection.request for connection in self.connections.copy()]
        return sum(request is not None and request.call is not None for request in requests)

    def reload(self, settings: Settings) -> None:
        """Replace all settings but the address; running requests keep the old ones."""
        if settings.server_address != self.settings.server_address:
            log.warning("the address remains %s until a restart", self.settings.server_address)
        previous = self.pool
        pool, keys = Pool(settings, previous), key_limiters(settings, self.keys)
        self.pool, self.keys, self.settings = pool, keys, settings
        previous.close(keep=self.pool.upstreams)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _for_each(self, action: Callable[[Connection], None]) -> None:
        """Call a method of each connection, without a pause between. Loop thread."""
        for connection in self.connections.copy():
            action(connection)

    # -- callbacks

    def on_connection(self) -> None:
        """Handle a readable listening socket. Loop thread."""
        try:
            self.accept_ready(64)  # bounded, so that a burst does not delay other connections
        except OSError as error:  # out of descriptors; on_tick() resumes
            log_exhaustion("cannot accept a connection", error)
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
                    self.loop.remove(request)
                    request.close()

    def stop_accepting(self) -> None:
        """Accept the kernel's backlog, then close the listening socket. Loop thread.

        Closing it with a backlog would reset those connections. Idempotent.
        """
        self.loop.remove(self.socket)
        with contextlib.suppress(OSError):
            self.accept_ready(self.request_queue_size)
        self.socket.close()
        self.accepting_stopped.set()

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
        log_access(request, now)

    def on_tick(self, now: float) -> None:
        """Enforce all deadlines, resume accepting, resume queued calls. Loop thread."""
        CancelScope.cancel_overdue(now)
        for connection in self.connections.copy():
            try:
                connection.on_tick(now)
            except Exception:
                log.exception("a bug in akashproxy, on the loop thread")
                connection.disconnect()
        if self.accept_paused and not self.draining:
            with contextlib.suppress(OSError):  # select() still has no room: at the next tick
                self.loop.add(self.socket, self.on_connection, self.on_connection)
                self.accept_paused = False
        self.pool.on_tick(now)
        self.resume_waiters()

    def resume_waiters(self) -> None:
        """Resume up to 32 calls queued for a controller, the others later. Loop thread.

        1,500 calls that time out at once would otherwise block the loop.
        """
        if self.pool.resume_waiters(32):
            self.loop.call_soon_threadsafe(self.resume_waiters)


def key_limiters(settings: Settings, previous: list[KeyLimiter]) -> list[KeyLimiter]:
    """Return the limiters of all keys; a key that keeps its name keeps its counts."""
    by_name = {key.name: key for key in previous}
    keys = [by_name.get(options.name) or KeyLimiter(options) for options in settings.keys]
    for key, options in zip(keys, settings.keys):
        key.options = options
    return keys


PROBE_ROUTES = ("/health", "/metrics")  # requested every few seconds: logged at debug level


def log_access(request: Request, now: float) -> None:
    """Write a request's line of the access log, probes at debug level."""
    record, writer, started_at = request.record, request.writer, request.started_at
    is_probe = request.route.label in PROBE_ROUTES and writer.status == 200
    level = logging.DEBUG if is_probe else logging.INFO
    if not log.isEnabledFor(level):
        return
    ended = "whole" if writer.status < 400 else "refused"
    if record.broken_off or not writer.finished:
        ended = "broken_off" if writer.finished else "client_left"
    usage: dict[str, Any] = record.usage or {}
    counted, estimated = ({}, usage) if is_estimated(usage) else (usage, {})
    trace = _TRACEPARENT.fullmatch(request.head.headers.get("traceparent", ""))
    facts = {
        "client": client_address(request),
        "key": request.key.name if request.key else "",
        "method": request.head.method,
        "path": shorten(request.head.path),
        "status": writer.status or 499,
        "ended": ended,
        "model": shorten(record.model),
        "answered_model": shorten(record.answered_model),
        "controller": record.controller,
        "first_ms": round(((record.first_token_at or now) - started_at) * 1000),
        "ms": round((now - started_at) * 1000),
        "bytes": writer.bytes_sent,
        "tokens_in": counted.get("prompt_tokens"),
        "tokens_out": counted.get("completion_tokens"),
        "estimated_in": estimated.get("prompt_tokens"),
        "estimated_out": estimated.get("completion_tokens"),
        "trace": trace[1] if trace else "",
        "id": request.id,
    }
    known = [f"{name}={value}" for name, value in facts.items() if value or value == 0]
    # Not by log.info(), which takes 5 % of a small request's CPU time to find the file and line.
    line = logging.LogRecord(log.name, level, "", 0, " ".join(known), None, None)
    line.facts = facts
    log.handle(line)


def join_address(host: str, port: int) -> str:
    """Format HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _family(host: str, port: int) -> tuple[int, str]:
    """Return the address family and numeric host to bind to; "": all interfaces."""
    if not host:
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise ConfigError([f"cannot listen on {host}: no such host"]) from None
    return family, str(address[0])


# == 20. demo =================================================================================
# A stand-in for Akash Chat on a loopback port, for --demo: no model, but the real wire format.


class DemoAkash(http.server.BaseHTTPRequestHandler):
    """Akash Chat's API in small: session, model list, streamed chat, image jobs.

    Any thread: a ThreadingHTTPServer of its own creates one handler for each connection.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    COOKIE = "session_token=" + "0123456789abcdef" * 4
    JSON_TYPE = {"Content-Type": "application/json"}
    STREAM_HEADERS = {"Content-Type": "text/plain; charset=utf-8", "X-Vercel-AI-Data-Stream": "v1"}
    jobs: dict[str, int] = {}  # number of status requests, by job
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
            self._send(200, b'{"success":true}', headers={**self.JSON_TYPE, "Set-Cookie": cookie})
        elif path == "/api/models/":
            models = [{"id": id, "name": id, "available": True} for id in ("demo", "AkashGen")]
            self._send(200, to_json(models))
        elif path == "/api/image-status/":
            self._send(200, to_json([self._image_status(query.partition("=")[2])]))
        elif path.startswith("/api/image/job_"):
            self._send(200, demo_image(path), headers={"Content-Type": "image/png"})
        else:
            self._send(404, b"{}")

    def _image_status(self, job: str) -> dict[str, Any]:
        """Return the next status of an image job: waiting twice, pending, succeeded."""
        self.jobs[job] = count = self.jobs.get(job, 0) + 1
        status = ("waiting", "waiting", "pending", "succeeded")[min(count, 4) - 1]
        result = f"/api/image/job_{job[:8]}_00001_.png" if status == "succeeded" else None
        position = max(0, 3 - count)
        return {"job_id": job, "status": status, "queue_position": position, "result": result}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, prompt = body["model"], body["messages"][-1]["content"]
        if self.path != "/api/chat/" or self.COOKIE not in self.headers.get("Cookie", ""):
            self._send(403, b'{"success":false,"message":"Unauthorized: Invalid session"}')
        elif model == "AkashGen":
            escaped = prompt.replace("'", "\\'")
            attributes = f"jobId='{new_id()[:16]}' prompt='{escaped}' negative=''"
            line = f'0:"<image_generation> {attributes}</image_generation>"\n'
            self._stream(line.encode())
        elif model != "demo":  # in the words of Akash Chat's backend, LiteLLM
            error = f"400: Invalid model name passed in model={model}."
            self._send(200, b"3:" + to_json(error) + b"\n", headers=self.STREAM_HEADERS)
        else:
            answer = demo_step(body["system"], [each["content"] for each in body["messages"]]) or (
                f'You asked {model}: "{prompt}" This is the demo: no model has read it, but each '
                "word of this answer took the same path as a real one."
            )
            words = re.findall(r"\S+\s*", answer)
            lines = [b"0:" + to_json(word) + b"\n" for word in words]
            self._stream(b'f:{"messageId":"msg-demo"}\n', *lines, delay=self.delay)

    def _stream(self, *lines: bytes, delay: float = 0.0) -> None:
        end = b'{"finishReason":"stop","usage":{"promptTokens":null,"completionTokens":null}'
        end = b"e:" + end + b',"isContinued":false}\nd:' + end + b"}\n"
        self._send(200, *lines, end, headers=self.STREAM_HEADERS, delay=delay)

    def _send(
        self, status: int, *parts: bytes, headers: dict[str, str] = JSON_TYPE, delay: float = 0.0
    ) -> None:
        self.send_response(status)
        headers = {**headers, "Keep-Alive": "timeout=5", "Transfer-Encoding": "chunked"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            time.sleep(delay)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("demo: " + format, *args)


DEMO_COMMANDS = (
    "echo 'Hello from the demo.' > akashproxy-demo.txt",
    "cat akashproxy-demo.txt",
    "wc -c akashproxy-demo.txt",
)
DEMO_END = "The demo is done: its model was a script, but your agent and each step were real."
DEMO_SHELLS = re.compile("(?i)bash|shell|exec|command")
DEMO_LAST_TOOLS = re.compile("(?i)submit|completion")
DEMO_FIELDS = {"command", "cmd", "commands"}  # what agents call a shell's command
DEMO_VALUES = {"boolean": True, "number": 9, "integer": 9, "array": [], "object": {}}


def demo_step(system: str, contents: list[str]) -> str:
    """Return the next answer to an agent, which writes, reads and measures a file.

    "" if there are no results yet, nor a function for the first step.
    """
    step = sum(content.count("<tool_response>") for content in contents)
    # some agents end with a call of their own only, such as cline's submit_and_exit
    command = (*DEMO_COMMANDS, "")[min(step, len(DEMO_COMMANDS))]
    names = DEMO_SHELLS if command else DEMO_LAST_TOOLS
    lines = re.findall(r'^{"type":"function".*}$', system, re.M)
    for function in (json.loads(line)["function"] for line in lines):
        parameters = as_dict(function.get("parameters"))
        required = as_list(parameters.get("required"))
        arguments = {
            name: demo_argument(name, as_dict(schema), command)
            for name, schema in as_dict(parameters.get("properties")).items()
            if name in required or name in DEMO_FIELDS
        }
        is_usable = not command or DEMO_FIELDS & set(arguments)
        if step <= len(DEMO_COMMANDS) and is_usable and names.search(function["name"]):
            call = _encode({"name": function["name"], "arguments": arguments})
            return f"I take step {step + 1}.\n<tool_call>\n{call}\n</tool_call>"
    return DEMO_END if step else ""


def demo_argument(name: str, schema: dict[str, Any], command: str) -> Any:
    """Return a value for a function's argument: the command, or any of its type."""
    if name not in DEMO_FIELDS:
        value = DEMO_VALUES.get(str(schema.get("type")), "a step of the demo")
        return next(iter(as_list(schema.get("enum"))), value)
    if schema.get("type") == "array":
        return [command] if name == "commands" else ["bash", "-c", command]
    return command


class DemoServer(http.server.ThreadingHTTPServer):
    """The server of DemoAkash; logs broken connections instead of printing them."""

    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("demo: %s", sys.exc_info()[1])


def demo_image(seed: str) -> bytes:
    """Return a small PNG: stripes whose colour is derived from the seed."""
    size, tint = 96, binascii.crc32(seed.encode()) & 255
    rows = [b"\0" + bytes((tint, 90 + y // 8 % 2 * 80, 255)) * size for y in range(size)]
    header = b"IHDR" + size.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = (header, b"IDAT" + zlib.compress(b"".join(rows)), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + binascii.crc32(chunk).to_bytes(4, "big")
        for chunk in chunks
    )


# == 21. page =================================================================================
# A page to chat with, a client of the API like any other. Knows nothing of the other sections.

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport"
  content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<meta name="theme-color" content="#ffffff" media="(prefers-color-scheme: light)">
<meta name="theme-color" content="#17181b" media="(prefers-color-scheme: dark)">
<title>akashproxy</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'
  viewBox='0 0 32 32'><rect width='32' height='32' rx='8' fill='%230a62b8'/>
  <path d='M8 9h8l8 7-8 7H8l8-7z' fill='white'/></svg>">
<style>
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif;
  --paper: light-dark(#fff, #17181b); --soft: light-dark(#f3f4f6, #24262b);
  --ink: light-dark(#1c1d20, #e6e7e9); --faint: light-dark(#5a5f68, #a3a9b3);
  --accent: light-dark(#0a62b8, #82bbff); --bad: light-dark(#b3261e, #ffa198);
  --good: light-dark(#1a7037, #7ddb99); --warn: light-dark(#8a5300, #f2bd62);
  --edge: 1px solid light-dark(#dcdfe4, #3a3d44); }
* { box-sizing: border-box; scrollbar-width: thin; } [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); } section, #log { outline-offset: -2px; }
a { color: var(--accent); } img { display: block; max-width: 100%; border-radius: .5rem; }
button, input, textarea, .button { min-width: 0; padding: .35rem .75rem; border: var(--edge);
  border-radius: .5rem; background: none; color: inherit; font: inherit; text-decoration: none; }
button, summary { flex: none; cursor: pointer; } input, textarea { width: 100%; }
::placeholder { color: var(--faint); opacity: 1; } ::backdrop { background: #0008; }
.small, summary, figcaption { color: var(--faint); font-size: .875rem; }
.bad { color: var(--bad); } .good { color: var(--good); } .warn { color: var(--warn); }
.row, .bar, #note, #key, header { display: flex; align-items: center; gap: .5rem 1rem; }
.row { flex-wrap: wrap; } .row, .bar { gap: .5rem; }
.name { max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

/* the frame: header, a chat or the controllers, composer */
body { display: flex; flex-direction: column; height: 100dvh; margin: 0;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
header { padding: .5rem 1rem; border-bottom: var(--edge); white-space: nowrap; }
header :is(a, button) { padding: .25rem 0; border: 0; border-bottom: 2px solid transparent;
  border-radius: 0; color: var(--faint); text-decoration: none; }
header [aria-current=true] { border-color: var(--accent); color: var(--ink); }
h1 { margin: 0 auto 0 0; font-size: 1rem; }
@media (width < 26rem) {
  header { justify-content: space-between; font-size: .9375rem; }
  h1 { position: fixed; opacity: 0; }
}
main { flex: 1; display: flex; flex-direction: column; min-height: 0; }
main > form, #note, #trouble, #turns, main > section > * {
  width: min(46rem, 100% - 2rem); margin: 0 auto; }
section, #log { flex: 1; overflow: auto; padding: 1.5rem 0; scrollbar-gutter: stable both-edges; }
#log { display: flex; flex-direction: column-reverse; }     /* its end stays in sight */
#turns { margin-bottom: auto; }
#status:not(:target), main:has(#status:target) :is(#log, #welcome, #form),
  main:has(#turns:empty) #log, main:has(#turns > *) #welcome { display: none; }
:is(#key, #note, #trouble):not(:empty) { padding: .5rem 0; }
#form { margin-bottom: .75rem; padding: .5rem .75rem; border: var(--edge); border-radius: 1rem; }
#form:focus-within { border-color: var(--accent); }
#field { max-height: 40vh; padding: .25rem 0 .5rem; border: 0; outline: 0; resize: none;
  field-sizing: content; }
#model { flex: 0 1 auto; }
#send { margin-inline-start: auto; background: var(--accent); color: var(--paper); }
#settings { margin-top: .5rem; }
#settings > div, .prompts { display: grid; gap: .75rem;
  grid: auto / repeat(auto-fit, minmax(var(--least, 6rem), 1fr)); }
#settings label:first-child { grid-column: 1 / -1; }
#welcome { display: grid; grid: auto / 100%; align-content: safe center; gap: 1.25rem; }
.prompts { --least: 12rem; } .prompts button { padding: .75rem 1rem; text-align: start; }

/* the turns */
.turn { margin-bottom: 1.5rem; }
.question { width: fit-content; max-width: 85%; margin-left: auto; padding: .6rem 1rem;
  border-radius: 1rem; white-space: pre-wrap; }
.tools { gap: 0 .75rem; min-height: 2rem; } .tools button { padding: .1rem 0; border: 0; }
.question + .tools { justify-content: end; } .line { margin-inline-end: auto; }
[aria-busy=true] > .text:is(:empty, :has(> p:last-child)) { --more: " \2026"; }
.text:empty::after, .text > p:last-child::after { content: var(--more, ""); }
details:has(> .thoughts:empty) { display: none; } details > :not(summary) { margin-top: .5rem; }
:is(.text, .thoughts, blockquote) > *, .answer > * { margin: 0 0 .75rem; }
p, li, td, th { white-space: pre-wrap; unicode-bidi: plaintext; text-align: start; }
.center { text-align: center; } .end { text-align: end; }
ol, ul { padding-inline-start: 1.6rem; } li > * { margin-block: .25rem; white-space: normal; }
.task { margin-inline-start: -1.4rem; list-style: none; }
.task > input { width: auto; margin-inline: 0 .4rem; }
h2 { font-size: 1.35rem; } h3 { font-size: 1.2rem; } h4, h5, h6 { font-size: 1.05rem; }
hr { border: 0; border-top: var(--edge); }
blockquote, .thoughts { padding-inline-start: 1rem; border-inline-start: var(--edge);
  border-width: 3px; color: var(--faint); }
.thoughts { font-size: .875rem; }
.scroll, .block { overflow: auto hidden; } math { font-size: 1.1em; }
.block { display: block math; math-style: normal; }
table { border-collapse: collapse; overflow-wrap: normal; }
td, th { min-width: 6rem; padding: .3rem .7rem; border: var(--edge); }
.picture { display: block; margin-top: .5rem; padding: 0; border: 0; }
:is(#images, .question) img { max-height: 8rem; }
pre, code { font: .875rem/1.5 ui-monospace, monospace; direction: ltr; unicode-bidi: isolate; }
:not(pre) > code { padding: .1em .3em; border-radius: .25rem; }
pre { margin: 0; padding: 0 1rem .75rem; overflow-x: auto; text-align: left; }
figure { margin: 0 0 1rem; border: var(--edge); border-radius: .5rem; }
figcaption { display: flex; align-items: center; min-height: 2.5rem; padding-inline: 1rem .25rem; }
figcaption span { flex: 1; } figcaption button { border: 0; }
th, .question, .prompts button, :not(pre) > code, li > :is([aria-current=true],
  [aria-pressed=true]) { background: var(--soft); }

/* the lists of chats and of models, a large image, the controllers */
dialog, #sidebar { width: min(40rem, 100% - 2rem); max-height: 90dvh; padding: 1rem;
  border: var(--edge); border-radius: .75rem; background: var(--paper); color: var(--ink); }
#sidebar { inset: 0 auto 0 0; width: min(20rem, 100%); height: 100dvh; max-height: none; }
#viewer { width: fit-content; } #viewer img { max-height: 75dvh; margin-bottom: .75rem; }
#found { margin-top: .5rem; }
:is(#chats, #models) { margin: .75rem 0 0; padding: 0; list-style: none; }
:is(#chats, #models) li { display: flex; unicode-bidi: normal; white-space: normal; }
li button { padding-inline: .5rem; border: 0; }
li > button:first-child { flex: 1; text-align: start; }
.card { padding: .75rem 1rem; border: var(--edge); border-radius: .75rem; }
#status > .card { margin-bottom: 1rem; } .card > * { margin: 0; font-size: 1rem; }
.card > .small { font-size: .875rem; } .state::before { content: "\25cf\a0"; }
</style>
<header>
  <h1>akashproxy</h1> <button popovertarget="sidebar" id="list">History</button>
  <a href="#chat">Chat</a> <a href="#status">Controllers</a> <button id="fresh">New chat</button>
</header>
<nav id="sidebar" aria-label="History" popover>
  <div class="row"><button popovertarget="sidebar">Close</button>
    <button id="save">Export as JSON</button></div>
  <ul id="chats"></ul>
</nav>
<main>
  <form id="key" method="dialog" hidden><input id="token" type="password" aria-label="Token"
    placeholder="Token" autocomplete="off"> <button>Use</button></form>
  <div id="trouble" class="bad" role="alert"></div>
  <div id="note" role="status"></div>
  <section id="welcome" aria-label="Welcome" tabindex="0"></section>
  <div id="log" role="log" aria-live="polite" aria-label="Conversation" tabindex="0">
    <div id="turns"></div></div>
  <section id="status" aria-label="Controllers" tabindex="0"></section>
  <form id="form" method="dialog">
    <div id="images" class="row"></div>
    <textarea id="field" rows="1" dir="auto" aria-label="Message" placeholder="Message"></textarea>
    <div class="bar">
      <button type="button" id="model" class="name" aria-haspopup="dialog">No models</button>
      <button type="button" id="attach" aria-label="Attach image">+</button>
      <button id="send">Send</button></div>
    <input id="file" type="file" accept="image/*" multiple hidden>
    <details id="settings"><summary>Settings</summary><div class="small">
      <label>System prompt <textarea id="system" rows="2" dir="auto"></textarea></label>
      <label>Temperature <input id="temperature" type="number" min="0" max="2" step="any"></label>
      <label>Top p <input id="top_p" type="number" min="0" max="1" step="any"></label>
      <label>Max tokens <input id="max_tokens" type="number" min="1"></label></div></details>
  </form>
</main>
<dialog id="picker" aria-label="Models"><form method="dialog">
  <input id="search" type="search" aria-label="Search models" placeholder="Search models">
  <div id="found" class="small" role="status"></div><ul id="models"></ul></form></dialog>
<dialog id="viewer" aria-label="Image"></dialog>
<script type="module">
const ui = Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (it) => [it.id, it]));
const SETTINGS = ["system", "temperature", "top_p", "max_tokens"];
const auto = {dir: "auto"};     // Arabic and Hebrew run from the right
let chat = null;        // {id, title, messages}: the conversation in sight, as it is stored
let stop = null;        // the AbortController of the answer that is being received
let names = null;       // of the models; null until they are listed

// -- elements: what is shown is made here, of elements and text, never of HTML
function make(name, ...parts) {     // "tag.class.class", with children and objects of properties
  const [tag, ...classes] = name.split("."), element = tag[0] === "m"
    ? document.createElementNS("http://www.w3.org/1998/Math/MathML", tag)
    : document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const part of parts.flat()) {
    if (typeof part === "string" || part instanceof Node) element.append(part);
    else Object.assign(element, part);
  }
  return element;
}
const button = (text, onclick, ...more) => make("button", text, {type: "button", onclick}, ...more);
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const tell = (...words) => ui.note.replaceChildren(...words);
const offer = (text, name, action) => tell(text, button(name, () => { tell(); action(); }));

// -- the server, as any client uses it
class Explained extends Error {}    // its message is for people; others have the browser's text
const explain = (error, otherwise) => error instanceof Explained ? error.message : otherwise;
async function api(path, options) {
  const {token} = sessionStorage, authorization = token && {Authorization: `Bearer ${token}`};
  const headers = {"Content-Type": "application/json", ...authorization};
  const response = await fetch(path, {...options, headers}).catch(() => null);
  if (response?.ok) return response;
  if (!response) throw new Explained("The server does not answer. Is it still running?");
  if (response.status === 401) {
    ui.key.hidden = false;
    ui.token.focus();
    throw new Explained(token ? "The token is wrong. Type the right one."
      : "This server needs a token. Type it above.");
  }
  const unread = {error: {message: `The server answered with ${response.status}.`}};
  const {error} = await response.json().catch(() => unread);
  throw failure(error, response.headers.get("Retry-After"));
}
function failure({message, code}, seconds) {    // what went wrong, and what to do
  const choice = code === "model_not_found" ? "Choose" : "Try again or choose";
  const advice = seconds ? `Try again in ${seconds} s.` : `${choice} another model.`;
  return new Explained(`${message.replace(/[^.!?]$/, "$&.")} ${advice}`);
}
async function* events(stream) {    // the data of each event of a text/event-stream, read as JSON
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done;) {
    const whole = (rest + part.value).split(/(?:\r\n|\n|\r(?!\n|$)){2}/);
    rest = whole.pop();
    for (const event of whole) {
      const data = event.match(/(?<![^\r\n])data:[^\r\n]*/g)?.map((line) => line.slice(5));
      if (data && data[0].trim() !== "[DONE]") yield JSON.parse(data.join("\n"));
    }
  }
}

// -- Markdown: each kind of block, and of text in a line, has a pattern and a function
const anyOf = (kinds, flags) => RegExp(
  Object.entries(kinds).map(([name, [{source}]]) => `(?<${name}>${source})`).join("|"), flags);
function* scan(text, kinds, pattern) {  // each {own, at, shape} in turn: its text, place, function
  for (const {0: own, index: at, groups} of text.matchAll(pattern)) {
    const kind = Object.keys(groups).find((name) => groups[name] !== undefined);
    yield {own, at, shape: kinds[kind][1]};
  }
}
const DEEPEST = 8;      // levels of lists and quotes; what is nested deeper is text
const BULLET = String.raw`[-*+](?:[ \t]+|$)`, NUMBER = String.raw`\d{1,9}[.)](?:[ \t]+|$)`;
const ROW = String.raw`[^|\n]*\|.*`, DIVIDER = String.raw`(?=[ \t|:]*-)[ \t|:-]+$`;
const MARK = String.raw`$|>|\x60{3}|~{3}|#{1,6}[ \t]|[-*_]{3,}[ \t]*$|${BULLET}|${NUMBER}`;
const MORE = String.raw`\n(?![ \t]*(?:${MARK})|${ROW}\n${DIVIDER}).*`;      // of a paragraph
const items = (mark) => String.raw`${mark}.*`
  + String.raw`(?:${MORE}|\n(?:[ \t]*\n)*(?:\k<indent>[ \t]+\S|[ \t]*${mark}).*)*`;
const BLOCKS = {
  fence: [RegExp(String.raw`^[ \t]*(?<mark>\x60{3,}(?=[^\x60\n]*$)|~{3,}).*`
    + String.raw`(?:\n(?![ \t]*\k<mark>[ \t]*$).*)*(?:\n.*)?`), fence],
  heading: [/^[ \t]*#{1,6}[ \t].*/, heading],
  rule: [/^[ \t]*(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/, () => make("hr")],
  table: [RegExp(String.raw`^${ROW}\n${DIVIDER}(?:\n${ROW})*`), table],
  quote: [RegExp(String.raw`^[ \t]*>.*(?:\n[ \t]*>.*|${MORE})*`), (own, depth) =>
    make("blockquote", nested(own.replace(/^[ \t]*> ?/gm, ""), depth + 1))],
  list: [RegExp(String.raw`^(?<indent>[ \t]*)(?:${items(BULLET)}|${items(NUMBER)})`), list],
  text: [RegExp(String.raw`^[ \t]*\S.*(?:${MORE})*`), (own) => make("p", inline(own))],
};
const BLOCK = anyOf(BLOCKS, "gm");
const nested = (text, depth) => depth > DEEPEST ? [make("p", text)]
  : Array.from(scan(text, BLOCKS, BLOCK), ({own, shape}) => shape(own, depth));
function draw(place, text) {        // what has not changed since the last time stays as it is
  const old = place.blocks ?? [];
  let level = 1;
  place.blocks = [...scan(text, BLOCKS, BLOCK)];
  place.blocks.forEach((block, at) => {
    const {own, element} = old[at] ?? {};
    block.element = own === block.own ? element
      : Object.assign(block.shape(block.own, 0, level), auto);
    level = block.element.level ?? level;
    if (!element) place.append(block.element);
    else if (element !== block.element) element.replaceWith(block.element);
  });
  for (const {element} of old.slice(place.blocks.length)) element.remove();
}
function fence(own) {
  const [, indent, mark, name, code] = own.match(/^([ \t]*)(`+|~+)(.*)\n?([^]*)/);
  const inside = code.replace(RegExp(`(?:^|\n)[ \t]*${mark}[ \t]*$`), "");
  return listing(inside.replace(RegExp(`^${indent}`, "gm"), ""), name.trim());
}
function heading(own, depth, above) {   // one level down at a time, as screen readers expect it
  const [, marks, title] = own.match(/(#+)(.*)/);
  if (depth) return make("p", make("strong", inline(title.trim())));
  const level = Math.min(marks.length + 1, above + 1, 6);
  return make(`h${level}`, inline(title.trim()), {level});
}
function list(own, depth) {
  const start = parseInt(own), mark = start >= 0 ? NUMBER : BULLET;
  const next = RegExp(`\n(?=[ \t]{0,${own.search(/\S/)}}${mark})`, "m");
  const made = own.split(next).map((part) => item(part, depth + 1));
  return start >= 0 ? make("ol", made, {start}, auto) : make("ul", made, auto);
}
function item(own, depth) {
  const {length} = own.match(/^\s*\S+[ \t]*/)[0];
  const inside = own.slice(length).replace(RegExp(`^[ \t]{0,${length}}`, "gm"), "");
  const [, box, words] = inside.match(/^(?:\[([ xX])\][ \t]+)?([^]*)/);
  const made = nested(words, depth), checked = box !== " ", ariaLabel = checked ? "done" : "open";
  if (made[0]?.tagName === "P") made.splice(0, 1, ...made[0].childNodes);
  const mark = box && make("input", {type: "checkbox", disabled: true, checked, ariaLabel});
  return make(box ? "li.task" : "li", mark, made);
}
function table(own) {
  const split = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/)
    .map((text) => text.trim());
  const [head, divider, ...rows] = own.split("\n").map(split);
  const sides = divider.map((it) => it.endsWith(":") ? it[0] === ":" ? ".center" : ".end" : "");
  const cells = (tag, texts) => make("tr", texts.slice(0, sides.length).map((text, column) =>
    make(tag + sides[column], inline(text.replaceAll("\\|", "|")))));
  const made = make("table", make("thead", cells("th", head)),
    make("tbody", rows.map((texts) => cells("td", texts))));
  return make("div.scroll", made, {tabIndex: 0, role: "group", ariaLabel: "Table"});
}

// Each pattern stops at its own mark: a line of marks takes no longer than another of its length.
const within = (mark) => String.raw`(?:[^${mark}\\\x60]|\\[^]|\x60[^\x60]*\x60)+`;  // \x60: code
const STAR = within("*"), LOW = within("_");
const marked = (tag, width) => (own) => make(tag, inline(own.slice(width, -width)));
const formula = (tag, width) => (own) =>
  make(tag, group((own.slice(width, -width).match(TOKEN) ?? []).reverse(), 0));
const link = (href, text) => make("a", text, {href, target: "_blank", rel: "noopener"});
const ENTITIES = {amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\xa0", "#39": "'"};
const SPANS = {
  code: [/``.+?``(?!`)|`[^`]+`/, code],
  display: [/\$\$[^$]+\$\$|\\\[(?:[^\\]|\\[^[\]\\]|\\\\(?!\[))+\\\]/, formula("math.block", 2)],
  brackets: [/\\\((?:[^\\\n]|\\[^()\\\n])+\\\)/, formula("math", 2)],
  dollars: [/\$(?![\s$])[^$\n`]+(?<!\s)\$(?![\d$])/, formula("math", 1)],
  strong: [RegExp(String.raw`\*\*(?=\*?[^\s*])(?:${STAR})?(?:\*${STAR}\*(?:${STAR})?){0,3}\*\*`
    + String.raw`|(?<!\w)__(?=\S)${LOW}__(?!\w)`), marked("strong", 2)],
  emphasis: [RegExp(String.raw`(?<![\w*\\])\*(?=\S)${STAR}(?:\*\*${STAR}\*\*(?:${STAR})?){0,3}`
    + String.raw`\*(?![\w*])|(?<![\w\\])_(?=\S)${LOW}_(?!\w)`), marked("em", 1)],
  deleted: [RegExp(String.raw`~~(?=\S)${within("~")}~~`), marked("del", 2)],
  link: [RegExp(String.raw`!?\[(?:[^[\]\x60]|\x60[^\x60]*\x60)*\]`
    + String.raw`\(https?:\/\/(?:[^\s()]|\([^\s()]*\))+(?: +"[^"\n]*")?\)`), linkOrPicture],
  address: [/https?:\/\/[^\s<>()*`"']*[^\s<>()*`"'.,;:!?]/, (own) => link(own, own)],
  escape: [/\\[^\w\s]/, (own) => own[1]],
  entity: [/&(?:amp|lt|gt|quot|nbsp|#39);/, (own) => ENTITIES[own.slice(1, -1)]],
  newLine: [/<br ?\/?>/, () => make("br")],
};
const SPAN = anyOf(SPANS, "g");
function inline(text) {
  const parts = [];
  let end = 0;
  for (const {own, at, shape} of scan(text, SPANS, SPAN)) {
    parts.push(text.slice(end, at), shape(own));
    end = at + own.length;
  }
  return [...parts, text.slice(end)];
}
function code(own) {
  const width = own.startsWith("``") ? 2 : 1, words = own.slice(width, -width);
  return make("code", /^ .+ $/s.test(words) ? words.slice(1, -1) : words, {dir: "ltr"});
}
function linkOrPicture(own) {
  const middle = own.lastIndexOf("](http"), label = own.slice(own.indexOf("[") + 1, middle);
  const [href] = own.slice(middle + 2, -1).split(" ");
  const [, name = ""] = href.split(`//${location.host}${location.pathname}images/`);
  if (own[0] === "!" && /^\w[\w.-]*$/.test(name)) return picture(name, label);
  return link(href, inline(label).map((part) => part.tagName === "A" ? part.textContent : part));
}

// -- TeX as MathML: the commands that models write most; others stay as they are written
const SYMBOLS = new Map(Array.from(`alpha α beta β gamma γ delta δ epsilon ε theta θ lambda λ mu μ
  nu ν pi π rho ρ sigma σ tau τ phi φ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Sigma Σ Phi Φ Omega Ω
  sum ∑ prod ∏ int ∫ infty ∞ partial ∂ nabla ∇ cdot · times × div ÷ pm ± le ≤ leq ≤ ge ≥ geq ≥ ne ≠
  neq ≠ approx ≈ equiv ≡ sim ∼ in ∈ notin ∉ subset ⊂ subseteq ⊆ cup ∪ cap ∩ forall ∀ exists ∃ to →
  rightarrow → Rightarrow ⇒ implies ⇒ iff ⇔ ldots … dots … cdots ⋯ langle ⟨ rangle ⟩ mid ∣ circ ∘
  { { } } | ‖ quad \u2003 , \u2009 ; \u2004`
  .matchAll(/(\S{1,12}) (.)/g), (pair) => pair.slice(1)));
const ACCENTS = new Map(Object.entries({hat: "^", bar: "¯", overline: "¯", vec: "→", tilde: "~"}));
const TOKEN =
  /\\(?:text\w*|math\w+|operatorname)\{[^{}]*\}|\\(?:[A-Za-z]+|[^])|\d+(?:\.\d+)?|[^\s\\]/g;
function group(tokens, depth, end) {    // takes the next tokens, which stand last, and `end`
  const made = [];
  while (tokens.length && tokens.at(-1) !== end) made.push(scripted(tokens, depth));
  tokens.pop();
  return make("mrow", made);
}
function scripted(tokens, depth) {      // an atom with what stands below and above it
  const base = atom(tokens, depth), scripts = {};
  while (/^[_^]$/.test(tokens.at(-1)) && !scripts[tokens.at(-1)]) {
    scripts[tokens.pop()] = atom(tokens, depth + 1);
  }
  const {_: low, "^": high} = scripts, big = /^(?:[∑∏]|lim|max|min)$/.test(base.textContent);
  const tag = (low ? big ? "under" : "sub" : "") + (high ? big ? "over" : "sup" : "");
  return tag ? make(`m${tag}`, base, low, high) : base;
}
function atom(tokens, depth) {
  const token = tokens.pop() ?? "", next = () => atom(tokens, depth + 1);
  const [, command = "", words] = token.match(/^\\([A-Za-z]+)(?:\{([^]*)\})?$/) ?? [];
  if (words) return make("mtext", words);
  if (depth < 30) {     // nested deeper, commands stay as they are written
    if (token === "{") return group(tokens, depth + 1, "}");
    if (/^[dt]?frac$/.test(command)) return make("mfrac", next(), next());
    if (command === "sqrt") return make("msqrt", next());
    if (/^(?:left|right|boxed|displaystyle|[Bb]igg?)$/.test(command)) return next();
    if (ACCENTS.has(command)) return make("mover", next(), make("mo", ACCENTS.get(command)));
  }
  if (/^(?:log|ln|exp|sin|cos|tan|lim|max|min|det)$/.test(command)) return make("mi", command);
  const text = token.length > 1 && SYMBOLS.get(token.slice(1)) || token;
  if (text[0] === "\\") return make("mtext", text);
  return make(/^\d/.test(text) ? "mn" : /^[\p{L}∞]/u.test(text) ? "mi" : "mo", text);
}

// -- images and code
function picture(name, alt) {   // fetched, to send the token; as PNG, since SVG can hold a script
  const image = make("img", {alt}), frame = enlargeable(image);
  image.onerror = () => frame.replaceWith(make("span.bad", "This image can't be shown."));
  api(`images/${name}`).then((response) => response.blob()).then((blob) => {
    image.src = URL.createObjectURL(blob.slice(0, blob.size, "image/png"));
  }).catch(image.onerror);
  return frame;
}
const enlargeable = (image) => button(image, () => enlarge(image), {className: "picture"});
function enlarge({src, alt}) {
  const type = src.startsWith("data:image/jpeg") ? "jpg" : "png";
  const save = {href: src, download: `${alt.slice(0, 60) || "image"}.${type}`};
  ui.viewer.replaceChildren(make("img", {src, alt}), make("div.row",
    make("a.button", "Save", save), button("Close", () => ui.viewer.close())));
  ui.viewer.showModal();
}
const copying = (text) => button("Copy", async ({target}) => {
  await navigator.clipboard.writeText(text);
  target.textContent = "Copied";
}, {hidden: !navigator.clipboard});     // plain HTTP has none
const listing = (text, name) => make("figure",
  make("figcaption", make("span", name), copying(text)),
  make("pre", make("code", text, {dir: "ltr"}), {tabIndex: 0}));
async function shrink(blob) {   // a data: URL of 1024 pixels a side at most, for chats are kept
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", {width: bitmap.width * scale, height: bitmap.height * scale});
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(blob.type === "image/png" && scale === 1 ? "image/png" : "image/jpeg");
}
async function attach(files) {
  for (const file of [...files]) {
    await shrink(file).then(addImage, () => tell(`${file.name} is not an image.`));
  }
}
const attached = (src) => make("img", {src, alt: "Attached image"});
function addImage(src) {
  const remove = button("×", () => remove.parentNode.remove(), {ariaLabel: "Remove image"});
  ui.images.append(make("div.row", attached(src), remove));
}

// -- what the browser keeps: each chat under a key of its own, so that two tabs don't collide
function keep(name, value) {
  try { localStorage[name] = JSON.stringify(value); } catch {
    tell("The browser's storage is full. Export and delete some chats.");
  }
}
function stored(name) {
  try { return JSON.parse(localStorage[name]); } catch { return null; }     // none, or not ours
}
const keepChat = (own) => keep(`chat ${own.id}`, own);
const keepSettings = () => keep("settings", {model: ui.model.value, chat: chat.id,
  ...Object.fromEntries(SETTINGS.map((name) => [name, ui[name].value]))});
const allChats = () => Object.keys(localStorage).filter((name) => name.startsWith("chat "))
  .map(stored).filter((each) => each?.messages).sort((one, other) => other.id - one.id);
function listChats() {
  ui.chats.replaceChildren(...allChats().map((each) => make("li",
    button(each.title, () => show(each),
      {className: "name", ariaCurrent: each.id === chat.id}, auto),
    button("✎", () => rename(each), {ariaLabel: `Rename ${each.title}`}),
    button("×", () => remove(each), {ariaLabel: `Delete ${each.title}`}))));
}
function rename(each) {
  const own = each.id === chat.id ? chat : each;
  own.title = prompt("Title of the chat", own.title)?.trim() || own.title;
  keepChat(own);
  listChats();
}
function remove(each) {
  delete localStorage[`chat ${each.id}`];
  if (each.id === chat.id) show(emptyChat());
  listChats();
  offer(`“${each.title}” is deleted.`, "Undo", () => { keepChat(each); show(each); });
}
ui.save.onclick = () => {
  const file = new Blob([JSON.stringify(allChats(), null, 2)], {type: "application/json"});
  make("a", {href: URL.createObjectURL(file), download: "chats.json"}).click();
};

// -- the chat
const emptyChat = () => ({id: Date.now(), title: "", messages: []});
const parts = ({content}) => typeof content === "string" ? [{text: content}] : content;
const words = (message) => parts(message)[0].text;
const images = (message) => parts(message).slice(1).map((part) => part.image_url.url);
function show(other) {
  stop?.abort();
  chat = other;
  drawTurns(0);
  tell();
  ui.sidebar.hidePopover();
  keepSettings();
}
function drawTurns(from) {      // those before stay as they are
  while (ui.turns.children.length > from) ui.turns.lastChild.remove();
  chat.messages.slice(from).forEach((message, at) => {
    const element = (message.role === "user" ? question : answer)(message, from + at);
    ui.turns.append(element);
    element.finish?.();
  });
}
function question(message, at) {
  const shown = images(message).map((src) => enlargeable(attached(src)));
  const edit = () => {
    if (stop) return;
    cut(at);
    compose(words(message), images(message));
    ui.field.focus();
  };
  return make("div.turn", make("div.question", words(message), shown, auto),
    make("div.tools.small.row", copying(words(message)), button("Edit", edit)));
}
function compose(text, pictures) {
  ui.field.value = sessionStorage.draft = text;
  ui.images.replaceChildren();
  pictures.forEach(addImage);
}
function cut(at) {      // removes the turns from one on; until others come the browser keeps them
  const own = chat, before = [...chat.messages];
  const restore = () => { own.messages = before; show(own); keepChat(own); };
  offer("The turns from here on are removed.", "Undo", restore);
  chat.messages.length = at;
  drawTurns(at);
}
function answer(message, at) {  // the element of an answer; update() and finish() draw its message
  const own = chat, thoughts = make("div.thoughts"), text = make("div.text");
  const summary = make("summary.name"), turn = make("article.turn.answer",
    make("details", summary, thoughts), text, {ariaBusy: "true"});
  turn.update = () => {
    summary.textContent = message.content ? "Thoughts" : message.reasoning.trim().split("\n").pop();
    draw(thoughts, message.reasoning);
    draw(text, message.content);
  };
  turn.finish = () => {
    turn.update();
    const again = () => { if (!stop) { cut(at); ask(); } };
    const code = make("details", make("summary", "As curl and Python"));
    code.ontoggle = () => code.children[1] || code.append(...examples(bodyOf(own, at)));
    if (message.problem) turn.append(make("p.bad", message.problem));
    turn.append(make("div.tools.small.row", make("span.line", message.line ?? ""),
      copying(message.content), button("Try again", again)), code);
    turn.ariaBusy = "false";
  };
  return turn;
}
function bodyOf({messages}, at) {       // an answer's request, without questions that have none
  const {request, system} = messages[at];
  const sent = messages.slice(0, at).filter(({role, content}, index) =>
    role === "user" ? index + 1 === at || messages[index + 1].content : content);
  if (system) sent.unshift({role: "system", content: system});
  return {...request, messages: sent.map(({role, content}) => ({role, content}))};
}
function paced(work) {  // with the layout it takes a fifth of the time, however long an answer is
  let timer = 0, pause = 20;
  const run = () => {
    const started = performance.now();
    work();
    ui.log.scrollHeight;    // lays the page out
    [timer, pause] = [0, Math.max(20, 4 * (performance.now() - started))];
  };
  return () => { timer ||= setTimeout(run, pause); };
}
async function ask() {  // for the answer to the chat's last question
  const own = chat, at = own.messages.length;
  const message = {role: "assistant", content: "", reasoning: "", system: ui.system.value.trim(),
    request: {model: ui.model.value}, problem: "The page was closed before the end."};
  for (const name of SETTINGS.slice(1)) {
    if (ui[name].value) message.request[name] = Number(ui[name].value);
  }
  own.messages.push(message);
  const turn = answer(message, at);
  ui.turns.append(turn);
  ui.log.scrollTop = 0;     // the end
  [stop, ui.send.textContent] = [new AbortController(), "Stop"];
  try {
    await receive(message, bodyOf(own, at), paced(turn.update));
    delete message.problem;
  } catch (error) {
    message.problem = stop.signal.aborted ? "Stopped." : explain(error, ENDS[""]);
  }
  [stop, ui.send.textContent] = [null, "Send"];
  turn.finish();
  if (own === chat || stored(`chat ${own.id}`)) keepChat(own);
}
const ENDS = {length: "It reached its limit of tokens.", "": "The connection broke off.",
  content_filter: "A content filter ended the answer.",
  tool_calls: "It asks for a tool, and this page has none."};
async function receive(message, body, changed) {
  const started = performance.now();
  const response = await api("v1/chat/completions", {method: "POST", signal: stop.signal,
    body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}})});
  let first = 0, end = "", tokens = null;
  try {
    for await (const {error, usage, choices: [choice = {}] = []} of events(response.body)) {
      if (error) throw failure(error);
      const {content, reasoning_content: thoughts} = choice.delta ?? {};
      message.content += content?.replaceAll("\r", "") ?? "";
      message.reasoning += thoughts?.replaceAll("\r", "") ?? "";
      first ||= (content || thoughts) && performance.now();
      end = choice.finish_reason ?? end;
      tokens = usage?.completion_tokens ?? tokens;
      changed();
    }
  } finally {
    message.line = account(response.headers, first - started, performance.now() - first, tokens);
  }
  if (end !== "stop") throw new Explained(ENDS[end] ?? `The answer ended early: ${end}.`);
}
function account(headers, wait, took, tokens) {     // "paid, after a=429 · 0.4 s to first token"
  const tries = headers.get("X-Akashproxy-Route")?.split(", ") ?? [];
  const ignored = headers.get("X-Akashproxy-Ignored"), [name] = (tries.pop() ?? "").split("=");
  return [tries.length ? `${name}, after ${tries.join(", ")}` : name,
    wait > 0 && `${(wait / 1000).toFixed(wait < 95 ? 2 : 1)} s to first token`,
    wait > 0 && took > 100 && tokens > 1 && `${Math.round(tokens / took * 1000)} tokens/s`,
    tokens !== null && count(tokens, "token"),
    ignored && `ignored: ${ignored}`].filter(Boolean).join(" · ");
}
const BASE = new URL("v1", location).href;
function examples(body) {       // for a shell and for Python, without the token and images' data
  const token = sessionStorage.token ? ' -H "Authorization: Bearer $TOKEN"' : "";
  const brief = (name, value) => name === "url" ? `${value.split(",")[0]},...` : value;
  const data = JSON.stringify({...body, stream: true}, brief).replaceAll("'", "'\\''");
  return [listing(`curl -N ${BASE}/chat/completions${token} \\
  -H 'Content-Type: application/json' -d '${data}'`, "curl"), listing(`import os, openai

client = openai.OpenAI(base_url="${BASE}", api_key=os.environ.get("TOKEN", "none"))
request = ${JSON.stringify(body, brief)}
for chunk in client.chat.completions.create(stream=True, **request):
    print(chunk.choices[0].delta.content or "", end="")`, "Python")];
}

// -- the models and the first sight
const PROMPTS = ["Explain how a proxy works, in three sentences.",
  "Plan a weekend in Lisbon, as a table.",
  "Write a Python function that checks a password's strength."];
const isPhone = () => matchMedia("(pointer: coarse)").matches;
function choose(name) {
  ui.model.value = name;
  ui.model.textContent = ui.model.title = name || "No models";
  keepSettings();
}
function listModels() {     // those with all the words that are searched for; Enter takes the first
  const wanted = ui.search.value.toLowerCase().split(" ");
  const found = names.filter((name) => wanted.every((word) => name.toLowerCase().includes(word)));
  ui.found.textContent = `${found.length} of ${count(names.length, "model")}`;
  ui.models.replaceChildren(...found.map((name) =>
    make("li", make("button", name, {value: name, ariaPressed: name === ui.model.value}))));
}
function pick() {
  ui.search.value = "";
  listModels();
  ui.picker.showModal();
}
function greet() {
  const name = {className: "name"}, key = sessionStorage.token ? "$TOKEN" : "none";
  const keys = isPhone() ? "" : " Enter sends, Shift+Enter breaks the line, Escape stops.";
  ui.welcome.replaceChildren(make("h2", "What can I do for you?"),
    make("p.small", names.length ? `${count(names.length, "model")} to choose from.${keys}`
      : "No models are available."),
    make("div.prompts", PROMPTS.map((text) => button(text, () => submit(text)))),
    make("div.row", names.slice(0, 5).map((each) => button(each, () => choose(each), name)),
      names.length > 5 && button("More models", pick)),
    listing(BASE, "Base URL"),
    listing(`export OPENAI_BASE_URL=${BASE} OPENAI_API_KEY=${key}`, "Shell"));
}

// -- the controllers
function card(each, index, all) {
  const weights = all.map(({priority, weight}) => priority === each.priority ? weight : 0);
  const share = each.weight / (weights.reduce((sum, weight) => sum + weight) || 1);
  const cooling = each.rests_for_seconds ? `cooling down, ${each.rests_for_seconds} s`
    : each.models_cooling_down && `${count(each.models_cooling_down, "model")} cooling down`;
  const models = each.models === null ? "models unknown" : count(each.models, "model");
  const time = new Date(each.last_error_at).toLocaleTimeString(), part = Math.round(100 * share);
  return make("article.card", make("h2.row", each.name,
    make(`span.small.state.${cooling ? "warn" : "good"}`, cooling || "ready")),
    make("p.small", `Tier ${each.priority}, ${part} % of its requests · ${models}`),
    make("p.small", `${each.in_flight} in flight · ${each.served} served · ${each.failed} failed`),
    each.last_error && make("p.bad", `Last error: ${each.last_error}, ${time}`),
    each.login === "ended" && make("p.bad", "Its login has ended."));
}
function keyCard({name, ...figures}) {
  const line = Object.entries(figures).map(([figure, value]) => `${figure}: ${value ?? "none"}`);
  return make("article.card", make("h2", `Key ${name}`),
    make("p.small", line.join(" · ").replaceAll("_", " ")));
}
async function readStatus() {
  const {controllers, keys} = await (await api("status")).json();
  ui.status.replaceChildren(...controllers.map(card), ...keys.map(keyCard));
}

// -- what happens, and when
async function refresh() {      // the models, once, and the controllers while they are in sight
  if (document.hidden || !ui.key.hidden) return;
  let trouble = "";
  try {
    if (!names) await readModels();
    if (location.hash === "#status") await readStatus();
  } catch (error) {
    trouble = explain(error, "The server's answer can't be read.");
  }
  if (ui.trouble.textContent !== trouble) ui.trouble.textContent = trouble;     // said once
}
async function readModels() {
  const {data} = await (await api("v1/models")).json();
  names = data.map(({id}) => id);
  choose(names.includes(ui.model.value) ? ui.model.value : names[0] ?? "");
  greet();
  if (names.length) ui.field.focus();
}
function submit(text) {
  const pictures = Array.from(ui.images.querySelectorAll("img"),
    ({src: url}) => ({type: "image_url", image_url: {url}}));
  if (stop || !ui.model.value || !text && !pictures.length) return;
  const at = chat.messages.length;
  chat.title ||= text.slice(0, 60) || "Image";
  const content = pictures.length ? [{type: "text", text}, ...pictures] : text;
  chat.messages.push({role: "user", content});
  drawTurns(at);
  compose("", []);
  ask();
  keepChat(chat);
}
onhashchange = () => {
  const view = location.hash || "#chat";
  for (const link of document.querySelectorAll("header a")) link.ariaCurrent = link.hash === view;
  refresh();
};
onkeydown = (event) => {
  if (event.key === "Escape") stop?.abort();
  const newLine = event.shiftKey || event.isComposing || isPhone();
  if (event.target !== ui.field || event.key !== "Enter" || newLine) return;
  event.preventDefault();
  if (!stop) ui.form.requestSubmit();
};
ui.form.onsubmit = () => stop ? stop.abort() : submit(ui.field.value.trim());
ui.key.onsubmit = () => {
  sessionStorage.token = ui.token.value.replace(/[^!-~]/g, "");
  ui.key.hidden = true;
  refresh();
};
ui.field.oninput = () => { sessionStorage.draft = ui.field.value; };
ui.settings.onchange = keepSettings;
ui.model.onclick = () => names && pick();
ui.search.oninput = listModels;
ui.picker.onclose = () => { if (ui.picker.returnValue) choose(ui.picker.returnValue); };
ui.sidebar.onbeforetoggle = listChats;
ui.fresh.onclick = () => { location.hash = "#chat"; show(emptyChat()); ui.field.focus(); };
ui.attach.onclick = () => ui.file.click();
ui.file.onchange = () => { attach(ui.file.files); ui.file.value = ""; };
document.onpaste = ({clipboardData}) => attach(clipboardData.files);
ondragover = (event) => event.preventDefault();
ondrop = (event) => { event.preventDefault(); attach(event.dataTransfer.files); };
onpagehide = () => { if (stop) keepChat(chat); };      // the part of an answer that has come
const before = stored("settings") ?? {};
for (const name of SETTINGS) ui[name].value = before[name] ?? "";
ui.model.value = before.model ?? "";
ui.field.value = sessionStorage.draft ?? "";
show(stored(`chat ${before.chat}`) ?? emptyChat());
onhashchange();
setInterval(refresh, 1000);
</script>
"""


@functools.lru_cache(maxsize=None)
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers; it may run its own script and load nothing else."""
    import hashlib

    policy = (
        "default-src 'none'; connect-src 'self'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    for tag in ("style", "script"):
        text = PAGE.partition("<" + tag)[2].partition(">")[2].partition("</" + tag)[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return PAGE.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


# == 22. main =================================================================================
# The command line, the log and signals.


def main(argv: list[str] | None = None) -> int:
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


def command(argv: list[str]) -> int:
    """Run the command; ConfigError if arguments or settings are invalid."""
    options = parse_flags(argv)
    if options.health:
        options = parse_flags([*container_flags(), *argv])
    flags = {
        name: ",".join(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if isinstance(value, (str, list))
    }
    settings = Settings.load(dict(os.environ), flags)
    if options.health or options.check or options.ask:
        set_signal_mask("SIG_UNBLOCK")
        if options.health:
            return check_health(settings)
        print_settings(settings)
        return ask_controllers(settings) if options.ask else 0
    handler = LogWriter(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    handler.setFormatter(LogFormat(settings.log_format))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # not shown
    demo: dict[str, Any] = {}
    if options.demo:
        controllers = (ControllerSettings(type="akash", tools="prompt"),)
        demo = {"akash_base_url": DemoAkash.start(), "controllers": controllers, "upstream": ()}
    if settings.config_file:  # a reload must read this file, not search for another
        flags["config_file"] = settings.config_file

    def load() -> Settings:
        return dataclasses.replace(Settings.load(dict(os.environ), flags), **demo)

    return start(Server(dataclasses.replace(settings, **demo)), load, options.demo)


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
    MAX_BATCH = 1000  # lines written at once
    # Seconds until a line is written, with those that follow it. A switch of threads for each line
    # would take a fifth of a small request's CPU time.
    DELAY = 0.02
    FLUSH_TIMEOUT = 1.0  # seconds

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.lines: SimpleQueue[Any] = SimpleQueue()  # bytes, or an Event of flush()
        self.dropped = 0  # lines that the queue had no room for
        threading.Thread(target=self.write_all, name="akashproxy log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line. The caller, logging's handle(), holds the handler's lock."""
        try:
            if self.lines.qsize() < self.SIZE:
                self.lines.put(self.encode(record))
            else:
                self.dropped += 1
        except Exception:
            self.handleError(record)

    def encode(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def write_all(self) -> None:
        failed = logged = 0  # lines that couldn't be written; lost lines that the log mentions
        while True:
            batch = [self.lines.get()]
            time.sleep(self.DELAY)
            while len(batch) < self.MAX_BATCH and not self.lines.empty():
                batch.append(self.lines.get())
            unwritten = self.write(b"".join(item for item in batch if isinstance(item, bytes)))
            failed += unwritten.count(b"\n")
            lost = self.dropped + failed - logged
            if lost and not unwritten:
                message = "%d log lines were lost"
                record = log.makeRecord(log.name, logging.WARNING, "", 0, message, (lost,), None)
                if not self.write(self.encode(record)):
                    logged += lost
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()

    def write(self, data: bytes) -> bytes:
        """Write lines, blocking without a limit; returns what an error leaves unwritten."""
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # non-blocking by another process that shares it
                select.select([], [self.descriptor], [])
            except OSError:
                break
        return data

    def flush(self) -> None:
        """Wait until the queued lines are written, up to FLUSH_TIMEOUT."""
        written = threading.Event()
        self.lines.put(written)
        written.wait(self.FLUSH_TIMEOUT)


def parse_flags(argv: list[str]) -> Any:
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
        name = unknown[0].partition("=")[0]
        near = similar_to(name, re.findall("--[a-z-]+", parser.format_usage()))
        parser.error(
            f"unknown {'flag' if name.startswith('-') else 'argument'} {name[:100]}"
            + (f"; did you mean {near}?" if near else "; --help lists the flags")
        )
    return options


ACTIONS = {
    "--demo": "use a built-in simulation of Akash Chat: no network needed",
    "--check": "validate and print the effective settings, and exit",
    "--ask": "with --check: ask each controller for its models, and exit with 1 if one fails",
    "--health": "query /health of a running server, and exit with 0 if it is healthy, else 1",
}


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
    for flag, text in ACTIONS.items():
        parser.add_argument(flag, action="store_true", help=text)
    group = parser.add_argument_group("settings")
    for item in setting_fields(Settings).values():
        default = default_text(item)
        text = item.metadata["help"] + (f" (default: {default})" if default else "")
        metavar = {"str": "TEXT", "int": "NUMBER", "float": "SECONDS"}.get(item.type, "LIST")
        group.add_argument(
            flag_name(item),
            dest=item.name,
            metavar=metavar,
            help=text.replace("%", "%%"),
            action="append" if item.type.startswith("tuple") else "store",
        )
    return parser


def default_text(item: Any) -> str:
    """Format a setting's default for --help."""
    if item.default is dataclasses.MISSING:
        return ""
    return f"{item.default:g}" if item.type == "float" else format_value(item.default)


def print_settings(settings: Settings) -> None:
    """Print the effective settings with secrets redacted."""
    searched = [settings.config_path] if settings.config_path else CONFIG_DIRECTORIES
    print_text(f"# searched: {', '.join(searched)} for {' and '.join(FILE_NAMES)}")
    print_text(f"# file: {settings.config_file or 'none'}")
    for name, value in settings.redacted_items():
        print_text(f"{name.upper()}={value}")
    for controller in settings.pool():
        print_section(controller.name, controller, controller.sources)
    for key in settings.keys:
        print_section(f"key {key.name}", key, {})


def ask_controllers(settings: Settings) -> int:
    """Print a line on each controller's state; the exit status: 1 if one fails."""
    start_thread(enforce_deadlines, "deadlines")
    print_text("")
    pool, all_right = Pool(settings), True
    for upstream in pool.enabled:
        answered, line = ask_upstream(upstream)
        print_text(line)
        all_right = all_right and answered
    pool.close()
    return 0 if all_right else 1


def print_section(title: str, options: Any, sources: dict[str, str]) -> None:
    """Print the non-empty settings of a controller or key, some with their source."""
    print_text(f"\n[{title}]")
    for name, value in options.redacted_items():
        if value and name != "name":
            print_text(f"{name}={value}" + (f" ({sources[name]})" if sources.get(name) else ""))


def container_flags() -> list[str]:
    """Return the flags of the server that is this container's process 1; else [].

    A HEALTHCHECK doesn't know the arguments of ``docker run``, which may name another address.
    """
    with contextlib.suppress(OSError):
        with open("/proc/1/cmdline", "rb") as file:
            arguments = os.fsdecode(file.read()).split("\0")
        if sys.argv[0] in arguments:
            return list(filter(None, arguments[arguments.index(sys.argv[0]) + 1 :]))
    return []


def check_health(settings: Settings) -> int:
    """Query /health of the server with these settings, for containers without curl."""
    host, port = split_address(settings.server_address)
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=3)
    try:
        connection.request("GET", f"{settings.path_prefix}/health")
        response = connection.getresponse()
        print_text(response.read().decode("utf-8", "replace"))
        return 0 if response.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print_text(f"akashproxy: no answer from {settings.server_address}: {error}", sys.stderr)
        return 1
    finally:
        connection.close()


def start(server: Server, load: Callable[[], Settings], demo: bool) -> int:
    """Start a server, print its URLs and serve until a signal; the exit status."""
    raise_fd_limit()
    with contextlib.suppress(AttributeError):  # PyPy has another collector
        gc.freeze()  # the module's objects live on: collections need not traverse them
        gc.set_threshold(10_000)  # reference counts free nearly all: 2 % of a request's CPU time
    if not server.settings.needs_token and not server.is_loopback:
        log.warning(
            "anyone who can reach %s can use this server and its upstreams' keys and quotas: "
            "set BEARER_TOKEN",
            " or ".join(reachable_urls(server)),
        )
    signals = Signals()
    pool = f"{server.pool}, simulated without a network," if demo else server.pool
    lines = [f"akashproxy {__version__} serves {pool} on {server.url}/v1"]
    if server.server_name in WILDCARDS:
        lines.append(f"it listens on all addresses of this machine, port {server.server_port}")
    lines.append(f"page to chat with: {server.url}/   stop: Ctrl-C")
    server.start()
    print_text("\n".join(lines))
    return serve(server, load, signals)


WILDCARDS = ("0.0.0.0", "::")  # listening on all interfaces


def reachable_urls(server: Server) -> list[str]:
    """Return the base URLs by which other machines may reach the server."""
    if server.server_name not in WILDCARDS:
        return [server.url]
    hosts = []
    # Connecting a UDP socket sends nothing, but selects the local address towards the Internet.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))
            hosts.append(sock.getsockname()[0])
    urls = [f"http://{join_address(host, server.server_port)}" for host in hosts]
    return urls or [f"port {server.server_port} of this machine"]


def raise_fd_limit() -> None:
    """Raise the limit of file descriptors to the hard limit: each stream takes two."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


SIGHUP = getattr(signal, "SIGHUP", 0)  # 0: not available (Windows)
SIGNALS = {signal.SIGINT, signal.SIGTERM, SIGHUP} - {0}


def set_signal_mask(action: str) -> None:
    """Block or unblock our signals: none may be lost or fatal during start-up."""
    if SIGHUP:
        signal.pthread_sigmask(getattr(signal, action), SIGNALS)


class Signals:
    """Queue of received signals; the second SIGINT or SIGTERM exits. Main thread."""

    def __init__(self) -> None:
        self.received: SimpleQueue[int] = SimpleQueue()
        self.stops = 0  # SIGINT and SIGTERM received
        for number in SIGNALS:
            signal.signal(number, self.on_signal)
        set_signal_mask("SIG_UNBLOCK")

    def on_signal(self, number: int, frame: Any) -> None:
        if number != SIGHUP:
            self.stops += 1
            if self.stops > 1:
                # On a thread: the handler may have interrupted a put() that holds the queue's lock.
                flushing = threading.Thread(target=logging.shutdown, daemon=True)
                flushing.start()
                flushing.join(1.0)
                os._exit(0)
        self.received.put(number)

    def wait(self) -> int:
        """Wait for a signal.

        The timeout bounds this race: a signal arrives; the main thread begins to wait before its
        handler has run, and is not interrupted.
        """
        while True:
            with contextlib.suppress(Empty):
                return self.received.get(timeout=1.0)


def serve(server: Server, load: Callable[[], Settings], signals: Signals) -> int:
    """Serve until SIGINT or SIGTERM; SIGHUP reloads valid settings. The exit status."""
    while signals.wait() == SIGHUP:
        try:
            server.reload(load())
            log.warning("the settings were reloaded")
        except Exception as error:
            log.error("the settings stay as they were: %s", error)
    running = server.running_calls()
    if running:
        grace = server.settings.grace
        log.info("stopping: %d running requests have %g seconds to end", running, grace)
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
