# SPDX-License-Identifier: MIT
"""The tests of akashproxy, in the module's order: fakes on real sockets, tables, no mocks.

    python3 -m pytest test_akashproxy.py
    python3 test_akashproxy.py bench            # what the server costs, in a minute

The bytes of the fakes are recordings of the real server, made small; the names of their tables are
the names that the recordings have. Every section has a banner: grep -n '^# [=-]' test_akashproxy.py
"""

import argparse
import ast
import asyncio
import base64
import builtins
import collections
import concurrent.futures
import configparser
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import multiprocessing
import operator
import os
import pathlib
import py_compile
import random
import re
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import tracemalloc
import types
import zlib

import pytest

import akashproxy

try:
    import resource
except ImportError:     # Windows
    resource = None
from akashproxy import (AkashDecoder, Answer, APIError, BodyDecoder, Call, Category, ConfigError, StopFilter, Finish, ProtocolError,
                        Reasoning, Server, Settings, Text, ThinkTagFilter, ToolCall, fold)

FUZZ = int(os.environ.get("FUZZ", "1"))     # FUZZ=100 looks a hundred times as long for values that do harm
HERE = pathlib.Path(__file__).resolve().parent
SOURCE = (HERE / "akashproxy.py").read_text()
README = (HERE / "README.md").read_text()

akashproxy.EventLoop.TICK = 0.02     # the servers in this process look at their clocks more often, so that no test waits for them
sys.setswitchinterval(0.0005)        # nor for one of the many threads, of clients, servers and fakes, which take turns


# == fakes ====================================================================================

Asked = collections.namedtuple("Asked", "method path headers body")


class Fake:
    """A server that plays an upstream: it keeps what it was asked, and takes one fault per request from .faults.

    A fault is a function (socket, request) that answers in the fake's place; if it returns True the
    connection is kept. answer() does the honest work.
    """

    running = set()

    def __init__(self):
        self.running.add(self)
        self.requests, self.faults = [], collections.deque()
        self.connections = 0
        self.gone = threading.Event()       # a fault's client has closed its connection
        self.open = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                self.open.add(sock)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with contextlib.suppress(OSError, ValueError), sock, sock.makefile("rb") as stream:
            while True:
                request = self.read(stream)
                if request is None:
                    break
                self.requests.append(request)
                fault = self.faults.popleft() if self.faults and self.faulty(request) else None
                if not (fault(sock, request) if fault else self.answer(sock, request)):
                    break
            sock.shutdown(socket.SHUT_RDWR)
        self.open.discard(sock)

    @staticmethod
    def read(stream):
        line = stream.readline()
        if not line:
            return None
        headers = {}
        while True:
            name, colon, value = stream.readline().partition(b":")
            if not colon:
                break
            headers[name.decode().lower()] = value.strip().decode()
        method, path, _ = line.decode().split(" ")
        return Asked(method, path, headers, stream.read(int(headers.get("content-length", 0))))

    def faulty(self, request):
        return request.method == "POST"

    def bodies(self):
        return [json.loads(request.body) for request in self.requests if request.method == "POST"]

    def close(self):
        self.running.discard(self)
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)    # wakes accept()
        self.listener.close()
        self.hang_up()

    def hang_up(self):
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def sends(self, *answers, keep=False):
        """Answer the next requests with just these bytes; the fake itself."""
        return self.faulting(*(self.raw(data, keep) for data in answers))

    def faulting(self, *faults):
        """Take these faults for the next requests; the fake itself."""
        self.faults += faults
        return self

    def answers(self, part, fault):
        """Have a fault answer each request whose path has this part."""
        honest = self.answer
        self.answer = lambda sock, request: (fault if part in request.path else honest)(sock, request)

    # -- faults

    def raw(self, data, keep=False):
        return lambda sock, request: sock.sendall(data) or keep

    def refuse(self, times=1):
        """Hang up, and on a kept connection's second try again if ``times`` is 2."""
        return lambda sock, request: self.faults.extendleft([self.refuse(times - 1)] * (times > 1))

    def steps(self, *steps, keep=True):
        """Do one after the other: send bytes, wait for an event, sleep for some seconds, call a function."""
        def fault(sock, request):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for step in steps:
                if isinstance(step, threading.Event):
                    step.wait(60)
                elif isinstance(step, bytes):
                    sock.sendall(step)
                else:
                    step() if callable(step) else time.sleep(step)
            return keep
        return fault

    def endless(self, head, part, pause=0.0):
        """Send a part again and again until the client has left, which .gone tells."""
        def fault(sock, request):
            with contextlib.suppress(OSError):
                sock.sendall(head)
                while not self.gone.wait(pause):
                    sock.sendall(part)
            self.gone.set()
        return fault

    def stall(self, data=b""):
        """Send these bytes, then nothing more until the client has left, which .gone tells."""
        def fault(sock, request):
            sock.sendall(data)
            stalled(sock)
            self.gone.set()
        return fault


def reply(status=200, body=b"", kind="application/json", extra=b"", chunked=True):
    """An answer as the Akash server sends it; a body that is no bytes is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (b"HTTP/1.1 %d X\r\ncontent-type: %s\r\n%sConnection: keep-alive\r\nKeep-Alive: timeout=5\r\n" % (status, kind.encode(), extra))
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(body)


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def chunks(*parts):
    return b"".join(map(chunk, parts)) + b"0\r\n\r\n"


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\nx-vercel-ai-data-stream: v1\r\n"
               b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\r\n")
END = (b'e:{"finishReason":"%b","usage":{"promptTokens":null,"completionTokens":null},"isContinued":false}\n'
       b'd:{"finishReason":"%b","usage":{"promptTokens":null,"completionTokens":null}}\n')
STOP = END.replace(b"%b", b"stop")
STEP = b'f:{"messageId":"msg-YIO6swLd0bYjhz8oq6MbzdM8"}\n'
HELLO = STEP + b'0:"Hello"\n0:" from"\n0:" the"\n0:" mock"\n0:"."\n' + STOP
PNG = base64.b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAADklEQVR4nGOoRwIMxHEAa3IX0X6tn3UAAAAASUVORK5CYII=")
BAD_SESSION = b'{"success":false,"message":"Unauthorized: Invalid session"}'
JOB = "51083a4c-2de0-4dda-a793-3c0ae6cfab17"
PICTURE_LINE = (b"0:\"<image_generation> jobId='" + JOB.encode() + b"' prompt='A red fox in the snow' "
                b"negative='blurry'</image_generation>\"\n" + STOP)


class FakeAkash(Fake):
    """Akash Chat on the wire: session, models, chat, the states of a picture, the picture."""

    def __init__(self):
        super().__init__()
        self.chat = HELLO                   # what the stream says
        self.max_age = 600
        self.cookies = 0
        self.session = None                 # another answer to the session path
        self.me = self.limits = None        # answers to /api/auth/me/ and /api/rate-limit/status/; None: 404, as in July
        self.models = [{"id": "Meta-Llama-3-3-70B-Instruct", "available": True}, {"id": "Qwen/Qwen3", "available": True},
                       {"id": "off", "available": False}, {"id": "AkashGen"}]
        self.states = collections.deque()   # of the picture, before it is ready
        self.name = "job_51083a4c_00001_.png"

    @property
    def cookie(self):
        return "session_token=" + hashlib.sha256(str(self.cookies).encode()).hexdigest()

    def answer(self, sock, request):
        path = request.path.partition("?")[0]
        if path == "/api/auth/session/":
            self.cookies += 1
            sock.sendall(self.session or reply(body=b'{"success":true}', extra=(
                f"set-cookie: {self.cookie}; Path=/; Expires=Sat, 21 Nov 2026 19:48:03 GMT; Max-Age={self.max_age}; "
                "Secure; HttpOnly; SameSite=strict; Partitioned\r\n").encode()))
        elif path == "/api/models/":
            sock.sendall(reply(body=self.models))
        elif path in ("/api/auth/me/", "/api/rate-limit/status/"):
            sock.sendall((self.me if "me" in path.split("/") else self.limits) or reply(404, b"<!DOCTYPE html>", "text/html; charset=utf-8"))
        elif path == "/api/image-status/":
            state = self.states.popleft() if self.states else {"status": "succeeded", "result": f"/api/image/{self.name}"}
            sock.sendall(reply(body=[state] if isinstance(state, dict) else state, kind="text/plain"))
        elif path == f"/api/image/{self.name}":
            sock.sendall(reply(body=PNG, kind="image/png"))
        elif path == "/api/chat/" and self.session is None and self.cookie not in request.headers.get("cookie", ""):
            sock.sendall(reply(403, BAD_SESSION))
        elif path == "/api/chat/":
            sock.sendall(STREAM_HEAD + chunks(*self.chat.splitlines(True)))
        else:
            sock.sendall(reply(404, b'{"error":"Image not found"}'))
        return True

    # -- faults

    def stall(self, lines=None):
        return super().stall(b"" if lines is None else STREAM_HEAD + chunk(lines))

    def cut(self, lines=b"", proper=False):
        """Break off after some lines; ``proper`` ends the HTTP message as it should be."""
        return self.raw(STREAM_HEAD + (chunks(lines) if proper else chunk(lines)))


class FakeOpenAI(Fake):
    """An upstream that speaks OpenAI's API."""

    MODELS = ["gpt-x", "both"]

    def __init__(self, models=MODELS, text="Hi there."):
        super().__init__()
        self.models, self.text = models, text

    def answer(self, sock, request):
        if request.path == "/v1/models":
            sock.sendall(reply(body={"object": "list", "data": [
                name if isinstance(name, dict) else {"id": name, "object": "model", "created": 7, "owned_by": "fake"} for name in self.models]}))
        elif request.path.startswith("/v1/audio/"):
            sock.sendall(reply(body=b"ID3" + request.body, kind="audio/mpeg"))
        elif request.path == "/v1/chat/completions" and json.loads(request.body).get("stream"):
            sock.sendall(self.head() + chunks(*self.events()))
        elif request.path in ("/v1/chat/completions", "/v1/embeddings", "/v1/completions"):
            sock.sendall(reply(body=self.completion(), chunked=False))
        else:
            sock.sendall(reply(404, b'{"error":{"message":"no such path","type":"x","param":null,"code":null}}'))
        return True

    @staticmethod
    def head(kind="text/event-stream"):
        return STREAM_HEAD.replace(b"text/plain; charset=utf-8", kind.encode()).replace(b"x-vercel-ai-data-stream: v1\r\n", b"")

    def completion(self):
        return json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-x", "new": [1.0, None], "choices": [
            {"index": 0, "message": assistant(self.text), "finish_reason": "stop"}]}).encode()

    def events(self):
        return self.words(self.text)

    @classmethod
    def words(cls, text):
        for word in re.findall(r"\S+\s*", text):
            yield cls.event({"content": word})
        yield cls.event({}, "stop")
        yield b"data: [DONE]\n\n"

    @staticmethod
    def event(delta, finish=None):
        return b"data: " + json.dumps({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-x", "choices": [
            {"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"

    def begun(self, count):
        return self.head() + b"".join(map(chunk, list(self.events())[:count]))

    # -- faults

    def status(self, number, body=b'{"error":{"message":"told","type":"t","param":"p","code":"c"}}', extra=b""):
        return self.raw(reply(number, body, extra=extra), keep=True)

    def cut(self, after=1):
        """Break off: after so many events of a stream, or within the body."""
        return lambda sock, request: sock.sendall(
            self.begun(after) if json.loads(request.body).get("stream") else reply(body=self.completion(), chunked=False)[:-3])

    def early(self):
        """An answer that ends properly as HTTP, but without a finish."""
        return lambda sock, request: sock.sendall(
            self.begun(1) + b"0\r\n\r\n" if json.loads(request.body).get("stream") else reply(body=b'{"choices":')) or True

    def stall(self, after=None):
        return super().stall(b"" if after is None else self.begun(after))


# == servers ==================================================================================


@pytest.fixture(autouse=True)
def close_fakes():
    before = Fake.running.copy()
    yield
    for fake in Fake.running - before:
        fake.close()


@pytest.fixture
def akash():
    return FakeAkash()


@pytest.fixture
def fake():
    """An upstream that says "Hi there."; ``a`` and ``c`` are others, and ``b``, which says "from b."."""
    return FakeOpenAI()


a = c = fake


@pytest.fixture
def b():
    return FakeOpenAI(text="from b.")


@pytest.fixture
def serve(akash):
    """serve(**settings) starts a server in front of the fake."""
    with contextlib.ExitStack() as stack:
        def start(**changes):
            settings = {"server_address": "127.0.0.1:0", "akash_base_url": akash.url, "image_poll": 0.01, **changes}
            server = Server(Settings(**settings)).start()
            stack.callback(server.stop, 0)
            return server
        yield start


@pytest.fixture
def pool():
    """pool(fake, (fake, {"weight": 2}), ..., max_wait=0) starts a server in front of some fakes, called a, b, c..."""
    with contextlib.ExitStack() as stack:
        def start(*upstreams, **changes):
            controllers = []
            for name, upstream in zip("abcdef", upstreams):
                fake, more = upstream if isinstance(upstream, tuple) else (upstream, {})
                kind = {"type": "akash", "base_url": fake.url} if isinstance(fake, FakeAkash) else {"base_url": fake.url + "/v1"}
                controllers.append(akashproxy.ControllerSettings(**{"name": name, **kind, **more}))
            server = Server(Settings(**{"server_address": "127.0.0.1:0", "controllers": tuple(controllers), "max_wait": 0,
                                        "first_byte_timeout": 20, "idle_timeout": 20, **changes})).start()
            stack.callback(server.stop, 0)
            return server
        yield start


@pytest.fixture
def own():
    """own(class) is the controllers' type "own", own(class, path) a dialect at a path of its own, until the test ends."""
    tables = akashproxy.CONTROLLERS, akashproxy.ROUTES
    before = [dict(rows) for rows in tables]
    yield lambda value, path="": tables[bool(path)].update({path or "own": {"POST": value} if path else value})
    for rows, kept in zip(tables, before):
        rows.clear()
        rows.update(kept)


ECHO, OF_ONES_OWN = akashproxy.ControllerSettings(type="echo", speed=0.0), akashproxy.ControllerSettings(type="own")


def known(server):
    """Wait until the model lists have been read."""
    ask(server, path="/v1/models")
    return server


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def streamed(request):
    """Has a test run twice: for whole answers, and for streams."""
    return request.param


@pytest.fixture
def log(caplog):
    """What is logged, from INFO up."""
    caplog.set_level("INFO")
    return caplog


def wait_for(condition, seconds=30):
    """Wait until something that another thread does has happened."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# == clients ==================================================================================

Got = collections.namedtuple("Got", "status headers body json")


def connect(server, data=b"", timeout=20):
    """A connection to a server or a port, on which some bytes have been sent."""
    sock = socket.create_connection(("127.0.0.1", getattr(server, "server_port", server)), timeout=timeout)
    sock.sendall(data)
    return sock


def link_to(server):
    """A connection for ask_again()."""
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", getattr(server, "server_port", server), timeout=20))


def ask(server, method="GET", path="/health", body=None, headers=None):
    with link_to(server) as link:
        return ask_again(link, method, path, body, headers)


def ask_again(link, method="GET", path="/health", body=None, headers=None):
    data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
    link.request(method, path, data, headers or {})
    answer = link.getresponse()
    content = answer.read()
    value = None
    if answer.getheader("content-type", "").startswith("application/json") and content:
        value = json.loads(content)
    return Got(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content, value)


def receive(sock, until=None):
    """Read until some bytes have come, or until a condition holds of all that came; None: until the connection is closed."""
    got = b""
    while not (until(got) if callable(until) else until and until in got[-(2 << 20):]):
        part = sock.recv(1 << 20)
        if not part:
            assert until is None, got[-300:]
            break
        got += part
    return got


def talk(server, data, timeout=20, half_close=False):
    """Send raw bytes, and all that comes back until the server closes."""
    got = []
    with connect(server, data, timeout) as sock, contextlib.suppress(ConnectionResetError):
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        got.extend(iter(lambda: sock.recv(65536), b""))
    return b"".join(got)


def post(path, body, *fields):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *fields, "", ""]).encode() + data


def head_of(method, path, *fields):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


def status_of(sock):
    """The status of an answer, 0 if the connection was closed without one."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in got and (part := sock.recv(65536)):
            got += part
    return int(got[9:12] or b"0")


def unchunked(data):
    return BodyDecoder(CHUNKED).feed(data)


def lazy_client(server, data):
    """A client that asks and does not read, with a small buffer, which is soon full."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", server.server_port))
    sock.sendall(data)
    return sock


def lazy_stream(server, *fields):
    """One that has asked for a stream which does not fit into the buffers on the way, when they are full."""
    sock = lazy_client(server, post("/v1/chat/completions", {**BOTH, "stream": True}, *fields))
    wait_for(lambda: any(connection.output for connection in server.connections.copy()))
    return sock


def drain(sock):
    """Read a stream to its end, as fast as it comes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return receive(sock, b"0\r\n\r\n")


def end_cooldowns(server):
    """Let the next request ask controllers that have just failed."""
    for upstream in server.pool.upstreams:
        upstream.cooldowns.clear()


@contextlib.contextmanager
def no_more_threads():
    """The system can start no thread: none has room for such a stack."""
    threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(0)


def settle(server):
    """Wait until no client is connected and nothing is asked of the first upstream."""
    wait_for(lambda: not server.connections and not server.pool.upstreams[0].in_flight)


def message(role, content, **more):
    return {"role": role, "content": content, **more}


user, assistant, system, developer = (functools.partial(message, role) for role in ("user", "assistant", "system", "developer"))


def returned(id, content):
    return {"role": "tool", "tool_call_id": id, "content": content}


def text_part(text):
    return {"type": "text", "text": text}


CHAT = {"model": "Meta-Llama-3-3-70B-Instruct", "messages": [user("Hello, how are you?")]}
BOTH = {"model": "both", "messages": [user("hi")]}
ASKED = {"model": "both", "max_tokens": 64, "messages": [user("hi")]}
WANTED = {"model": "both", "input": "hi"}
WANTS = {"/v1/chat/completions": BOTH, "/v1/messages": ASKED, "/v1/responses": WANTED}       # a request of each dialect


WITH_A_TOOL = {"tools": [{"type": "function", "function": {"name": "f"}}]}


def relays(server):
    """The responses that the server's loop is relaying."""
    requests = [connection.request for connection in server.connections.copy()]
    return [request.relay for request in requests if request and request.relay]


def chat(server, body=None, headers=None, **fields):
    return ask(server, "POST", "/v1/chat/completions", {**(body or CHAT), **fields}, headers)


def keys(*names, **limits):
    """Settings for some keys, each "NAME-key"."""
    return tuple(akashproxy.ClientKeySettings(name=name, key=f"{name}-key", **limits) for name in names)


def bearer(name):
    return {"Authorization": f"Bearer {name}-key"}


def counts(server, name="alice"):
    """(in flight, requests, refused) of a key."""
    key, = [key for key in server.keys if key.name == name]
    return key.in_flight, key.requests, key.rejected


def samples(server, headers=None):
    """What /metrics tells: {(name, label values): number}."""
    got = ask(server, path="/metrics", headers=headers)
    assert got.status == 200 and got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8", got
    return read_samples(got.body.decode())


def read_samples(text):
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)+)\})? (\S+)', line).groups()
            found[(name, *re.findall(r'="((?:[^"\\]|\\.)*)"', labels or ""))] = float(value)
    return found


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def stalled(sock):
    with contextlib.suppress(OSError):
        receive(sock)


@contextlib.contextmanager
def crowd(server, count, data=None):
    """Connections on which the same bytes have been sent; None: a chat."""
    data = post("/v1/chat/completions", BOTH) if data is None else data
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server, data, 60)) for _ in range(count)]


def at_once(function, count, threads=16):
    """What a function returns to many threads."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda _: function(), range(count)))


def later(function, *args, **more):
    """A Future of what a function returns to a thread of its own."""
    def run():
        try:
            future.set_result(function(*args, **more))
        except BaseException as error:
            future.set_exception(error)

    future = concurrent.futures.Future()
    threading.Thread(target=run, daemon=True).start()
    return future


def error_of(expected, function, *args, **more):
    """The error that a call must raise."""
    with pytest.raises(expected) as caught:
        function(*args, **more)
    return caught.value


def refused(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def sse(body):
    """The events of a stream of chat chunks, which must be well formed and complete."""
    text = body.decode()
    assert text.endswith("data: [DONE]\n\n"), text[-300:]
    events = []
    for block in text.split("\n\n")[:-2]:
        assert block.startswith("data: {"), block
        events.append(json.loads(block[6:]))
    return events


def stream(server, body=None, **fields):
    """(text, reasoning, finish_reason, error) of a streamed chat, the chunks' shape checked."""
    got = chat(server, body, stream=True, **fields)
    assert got.status == 200, got.body
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    return read_chunks(sse(got.body))


def read_chunks(events):
    """What the chunks of a streamed chat say, as stream() tells it, their shape checked."""
    assert events[0]["choices"][0]["delta"] == assistant("") and events[0]["object"] == "chat.completion.chunk"
    error = events.pop() if "error" in events[-1] else {}
    assert list(error)[:1] == ["error"] * bool(error) and len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    choices = [choice for event in events for choice in event["choices"]]
    assert {choice["index"] for choice in choices} == {0} and not any(choice["finish_reason"] for choice in choices[:-1])
    assert (choices[-1]["finish_reason"] is None) == bool(error)
    answer = fold(read_chat(events))
    return answer.text, answer.reasoning, choices[-1]["finish_reason"], error.get("error")


def text_of(got):
    """The text of a chat, streamed or not; of one that broke off, what came before."""
    if got.json:
        return got.json["choices"][0]["message"]["content"]
    return "".join(choice["delta"].get("content") or "" for event in sse(got.body) for choice in event.get("choices", []))


def route_of(got):
    """Which controllers were asked for an answer, and the statuses that they gave."""
    return got.headers["x-akashproxy-route"]


def statuses(server, count, body=None, **fields):
    return [chat(server, body or BOTH, **fields).status for _ in range(count)]


def table(cases):
    """Parametrize a test by a table {a name: values of its first parameters}; ``case`` is a row as it stands."""
    def mark(test):
        names, rows = list(inspect.signature(test).parameters), list(cases.values())
        names = names[:len(rows[0])] if "case" not in names else ["case"]
        return pytest.mark.parametrize(names, [[row] for row in rows] if names == ["case"] else rows, ids=list(cases))(test)
    return mark


def merged(events):
    """Events with neighbours of one kind joined, so that cuts don't show."""
    out = []
    for event in events:
        if out and type(out[-1]) is type(event) and isinstance(event, (Text, Reasoning)):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def decoded(decoder, parts):
    """(events, error) of a stream that comes in some parts."""
    events = []
    for part in parts:
        events += decoder.feed(part)
        if decoder.error or decoder.complete or events and isinstance(events[-1], Finish):
            break
    else:
        events += decoder.close()
    return events, decoder.error and (decoder.error.status, decoder.error.message)


def filtered(step, parts):
    """The events that a filter makes of some texts and the end of an answer."""
    return [event for part in parts for event in step.feed([Text(part)])] + step.feed([Finish("stop")])


def pieces(data):
    """A text or bytes whole, cut once at every place, and all in single pieces."""
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at:at + 1] for at in range(len(data))]


def split(data, size):
    return [data[at:at + size] for at in range(0, len(data), size)]


# == errors and events ========================================================================


def test_an_error_has_openais_form_and_the_originals():
    error = APIError(429, "slow down", retry_after=1.2, retry=False)
    assert json.dumps(akashproxy.Dialect.error_body(error)) == (
        '{"error": {"message": "slow down", "type": "rate_limit_error", "param": null, "code": "rate_limit_exceeded"}, '
        '"code": 429, "data": {"msg": "slow down"}}')
    assert error.headers() == {"Retry-After": "2", "x-should-retry": "false"}


def test_fold_adds_up():
    assert Text("a") == Text("a") != Reasoning("a")
    answer = fold([Reasoning("h"), Reasoning("m"), Text("a"), ToolCall(1, "", "id1", "g"), ToolCall(0, "{", "id0", "f"),
                   ToolCall(0, "}"), Text("b"), Finish("stop")])
    assert answer == Answer("ab", "hm", [ToolCall(0, "{}", "id0", "f"), ToolCall(1, "{}", "id1", "g")], [], Finish("stop"))
    assert fold([Text("a"), akashproxy.Refusal("n"), akashproxy.Refusal("o")]) == Answer("a", refusal_text="no")


R, T = Reasoning, Text


@table({
    "no tag": ("Hello <b>you</b>", [T("Hello <b>you</b>")]),
    "think-inline": ('<think>\nOkay, "user" wants x.\n</think>\n\nFinal answer.', [R('Okay, "user" wants x.'), T("Final answer.")]),
    "think-split": ("<think>hmm</think>Done.", [R("hmm"), T("Done.")]),
    "think-unclosed": ("<think>never closed", [R("never closed")]),
    "blanks before the tag": (" \n<think>a</think>b", [R("a"), T("b")]),
    "only blanks": (" \n", [T(" \n")]),
    "an opening tag alone": ("<think>", []),
    "half a tag": ("<thi", [T("<thi")]),
    "half a closing tag": ("<think>a</thin", [R("a</thin")]),
    "tags within the answer are words of it": ("The tag <think> opens.", [T("The tag <think> opens.")]),
    "a second pair": ("<think>a</think>b<think>c</think>d", [R("a"), T("b<think>c</think>d")]),
    "a closing tag in quotes": ("Use `</think>` to end.", [T("Use `</think>` to end.")]),
    "breaks within a thought": ("<think>a\n\nb\n</think>\nc\n", [R("a\n\nb"), T("c\n")]),
})
def test_thinking_cut_anywhere(text, expected):
    for parts in pieces(text):
        assert merged(filtered(ThinkTagFilter(), parts)) == expected + [Finish("stop")], parts


def test_a_tag_that_was_never_opened():
    text = "reasoning first\n</think>\n\nanswer"     # think-noopen
    for parts in pieces(text):
        step = ThinkTagFilter()
        events = [event for part in parts for event in step.feed([Text(part)])] + step.close()
        answer = fold(events)
        assert (answer.reasoning, answer.text) == ("reasoning first", "answer"), parts
        assert "think" not in "".join(event.text for event in events if isinstance(event, Text)), "no tag shows in a stream"
    assert ThinkTagFilter().feed([Text(text)]) == [R("reasoning first"), T("answer")], "nothing had left"
    assert ThinkTagFilter().feed([Text("\n</think>x")]) == [T("x")], "nobody thought anything"
    step = ThinkTagFilter()
    assert step.feed([Text("a")]) + step.feed([Text("")]) + step.feed([Text("b")]) == [T("a"), T("b")], "an empty text is nothing"


@table({
    "no stop": (["#"], None, "abc", [T("abc"), Finish("stop", None)]),
    "a stop is not part of the answer": (["##"], None, "ab##cd", [T("ab"), Finish("stop", stop_sequence="##")]),
    "half a stop": (["##"], None, "ab#", [T("ab#"), Finish("stop")]),
    "the earliest of several": (["zz", "c"], None, "abczz", [T("ab"), Finish("stop", stop_sequence="c")]),
    "one begins within another": (["aab"], None, "xaaab", [T("xa"), Finish("stop", stop_sequence="aab")]),
    "a stop at once": (["a"], None, "abc", [Finish("stop", stop_sequence="a")]),
    "sixteen characters are two tokens": ([], 2, "0123456789abcdef", [T("0123456789abcdef"), Finish("stop")]),
    "the seventeenth is too many": ([], 2, "0123456789abcdefg", [T("0123456789abcdef"), Finish("length")]),
    "other alphabets weigh more": ([], 1, "привіт!", [T("привіт"), Finish("length")]),
    "East Asia's most": ([], 2, "日本語日本", [T("日本語日"), Finish("length")]),
    "a stop before the length": (["5"], 2, "0123456789abcdefg", [T("01234"), Finish("stop", stop_sequence="5")]),
    "a length within what may begin a stop": (["f----------"], 2, "0123456789abcdef-", [T("0123456789abcdef"), Finish("length")]),
    "a length before the stop": (["h"], 2, "0123456789abcdefgh", [T("0123456789abcdef"), Finish("length")]),
    "one within another": (["aaba", "ab"], None, "aabaab", [T("a"), Finish("stop", stop_sequence="ab")]),
    "one ends within another": (["abc", "bcd"], None, "xabcd", [T("x"), Finish("stop", stop_sequence="abc")]),
    "both end together": (["ab", "aab"], None, "xaab", [T("x"), Finish("stop", stop_sequence="aab")]),
    "the beginning of a longer one": (["abab", "b"], None, "aabab", [T("aa"), Finish("stop", stop_sequence="b")]),
    "a border": (["aabaaab"], None, "aabaabaaab", [T("aab"), Finish("stop", stop_sequence="aabaaab")]),
    "none of them": (["aaab", "aac"], None, "aabaaaa", [T("aabaaaa"), Finish("stop")]),
})
def test_cutoff_cut_anywhere(stops, most, text, expected):
    for parts in pieces(text):
        step = StopFilter(stops, most)
        events = [event for part in parts for event in step.feed([Text(part)])]
        cut = step.stopped
        events += step.feed([Finish("stop")])
        assert merged(events) == expected, parts
        assert cut == step.stopped, "the end came too late"
        assert cut == (expected != [T(text), Finish("stop")])


# == settings =================================================================================


@pytest.mark.parametrize("text, expected", {
    "localhost:16571": ("127.0.0.1", 16571), ":8080": ("", 8080), "[::1]:8080": ("::1", 8080),
    "0.0.0.0:8080": ("0.0.0.0", 8080), "[::]:1": ("::", 1), "example.org:65535": ("example.org", 65535),
    "localhost": "no port", "a:b": "not a valid port", ":99999": "not a valid port", ":": "not a valid port", "::1:80": "write an IPv6 address as",
    "[zz]:80": "zz", "a..b:80": "not a valid host name", "x" * 70 + ":80": "not a valid host name", ":+80": "not a valid port", ":٥": "not a valid port", "": "no port",
}.items())
def test_addresses(text, expected):
    if isinstance(expected, tuple):
        assert akashproxy.split_address(text) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            akashproxy.split_address(text)


@pytest.mark.parametrize("line, words", {
    "SERVER_ADDRESS=abc": "SERVER_ADDRESS: 'abc' has no port",
    "AKASH_BASE_URL=ftp://x": "AKASH_BASE_URL: 'ftp://x' is not an http:// or https:// URL",
    "AKASH_BASE_URL=http://x/?q": "only scheme",
    "AKASH_BASE_URL=http://u:p@x/": "only scheme",
    "AKASH_BASE_URL=http://x:99999": "AKASH_BASE_URL: ",
    "AKASH_BASE_URL=http://a b/": "only scheme",
    "AKASH_BASE_URL=http://a..b/": "not a valid host name",
    "BEARER_TOKEN= ": "BEARER_TOKEN: must not be empty",
    "IMAGE_POLL=0": "IMAGE_POLL: must be greater than 0",
    "CONNECT_TIMEOUT=0.0": "CONNECT_TIMEOUT: must be greater than 0",
    "IDLE_TIMEOUT=-1": "IDLE_TIMEOUT: '-1' is not a number of seconds",
    "IDLE_TIMEOUT=nan": "not a number",
    "IDLE_TIMEOUT=" + "9" * 400: "is not a number of seconds",
    "MAX_BODY=1e9": "MAX_BODY: '1e9' is not a whole number",
    "BEARER_TOKEN=a,,b": "BEARER_TOKEN: must not be empty",
    "BEARER_TOKEN=,": "BEARER_TOKEN: must not be empty",
    "BEARER_TOKEN=a\nb": "BEARER_TOKEN: only printable ASCII",
    "LOG_LEVEL=loud": "LOG_LEVEL: 'loud' is not one of",
    "AKASH_COOKIE=a=b\r\nX: y": "AKASH_COOKIE: only printable",
    "MODEL_ALIASES=a": "'a' is not NAME=VALUE",
    "TOOLS_PROMPT=Call something.": "must contain", "PAGE=maybe": "'maybe' is not one of on, off",
    **{f"PORT={port}": "is not a valid port" for port in ("x", "70000", "-1", "80 80")},
    **{f"PATH_PREFIX={prefix}": "is not /PATH" for prefix in ("secret", "/a b", "//a", "/a?b")},
    **{f"TRUSTED_PROXIES={network}": "" for network in ("x", "10.0.0.0/99", "a,")},
    **{f"{name}={proxy}": words for name, words in (("HTTPS_PROXY", "PROXY=none ignores it"), ("PROXY", "must be http://"))
       for proxy in ("https://p:1", "socks4://p", "ftp://p", "http://p:0", "http://p/x", "http://" + "u" * 300 + "@p:1")},
}.items())
def test_bad_settings_name_their_source(line, words):
    name, _, value = line.partition("=")
    problem, = error_of(ConfigError, Settings.load, {name: value}).problems
    assert problem.startswith(f"{name}: ") and words in problem


def test_settings_made_in_code_are_checked_too():
    settings = Settings(bearer_token="s3cret, two", cors_origins="https://a", akash_base_url="http://h/",
                        akash_access_token="s3cret", akash_cookie="s3cret")
    assert (settings.bearer_token, settings.cors_origins, settings.akash_base_url) == (("s3cret", "two"), ("https://a",), "http://h")
    assert "s3cret" not in repr(settings) + str(settings.redacted_items()) and ("bearer_token", "********") in settings.redacted_items()
    with pytest.raises(ConfigError, match="idle_timeout: must be greater than 0"):
        Settings(idle_timeout=-1)


# == http =====================================================================================


@table({
    "a request": (b"GET / HTTP/1.1\r\nHost: x\r\nA:b \r\n\r\nrest", ("GET / HTTP/1.1", {"host": "x", "a": "b"}, b"rest")),
    "one name twice": (b"G / HTTP/1.1\r\nA: 1\r\na: 2\r\n\r\n", ("G / HTTP/1.1", {"a": "1, 2"}, b"")),
    "cookies stay apart": (b"G / HTTP/1.1\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n\r\n", ("G / HTTP/1.1", {"set-cookie": "a=1\nb=2"}, b"")),
    "an empty value": (b"G / HTTP/1.1\r\nA:\r\n\r\n", ("G / HTTP/1.1", {"a": ""}, b"")),
    "no head at all": (b"", None),
    "a long value": (b"G / HTTP/1.1\r\nA: " + b"x" * 5000 + b"\r\n\r\n", ("G / HTTP/1.1", {"a": "x" * 5000}, b"")),
    "it ends early": (b"G / HTTP/1.1\r\nA: b", None),
})
def test_heads(data, expected):
    end = akashproxy.find_head_end(data, 0)
    assert expected == ((*akashproxy.parse_head(data[:end], functools.lru_cache(str)), data[end + 4:]) if end >= 0 else None)


LENGTH, CHUNKED = {"content-length": "5"}, {"transfer-encoding": "chunked"}
FRAMES = [b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"1\r\n\r\n\r\n", b"3\r\nabc\r\n"]


@table({
    "counted": (LENGTH, b"hello", b"hello", b""),
    "counted, and more": (LENGTH, b"helloGET", b"hello", b"GET"),
    "empty": ({"content-length": "0"}, b"", b"", b""),
    "chunked": (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", b"hello", b""),
    "two chunks and more": (CHUNKED, b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\nGET", b"hello", b"GET"),
    "extension and trailers": (CHUNKED, b'5 ;a="b"\r\nhello\r\n00;x\r\nA: b\r\nC: d\r\n\r\n', b"hello", b""),
    "capital digits": (CHUNKED, b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b""),
    "cut": (LENGTH, b"hell", ProtocolError, 0),
    "chunks cut": (CHUNKED, b"5\r\nhello\r\n", ProtocolError, 0),
    "the last chunk cut": (CHUNKED, b"5\r\nhello\r\n0\r\n", ProtocolError, 0),
    "no size and no data": (CHUNKED, b"\r\n\r\n", ProtocolError, 0),
    "leading zeros": (CHUNKED, b"0002\r\nhe\r\n003\r\nllo\r\n000\r\n\r\n", b"hello", b""),
    "a line break within": (CHUNKED, b"7\r\nhel\r\nlo\r\n0\r\n\r\n", b"hel\r\nlo", b""),
    "an empty chunk in the middle": (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n5\r\nworld\r\n0\r\n\r\n", b"hello", b"5\r\nworld\r\n0\r\n\r\n"),
    "a signed size": (CHUNKED, b"+5\r\nhello\r\n", ProtocolError, 0),
    "another digit": ({"content-length": "٥"}, b"", ProtocolError, 400),
    "a vertical tab": ({"transfer-encoding": "\x0bchunked"}, b"", ProtocolError, 501),
    **{f"a payload that looks like framing, {payload}": (CHUNKED, chunk(b"a") + chunk(payload) + chunks(b"b"), b"a" + payload + b"b", b"")
       for payload in FRAMES},
})
def test_bodies_cut_anywhere(fields, data, expected, rest):
    for parts in pieces(data) if len(data) < 100 else [[data]]:
        def read():
            body, got = BodyDecoder(fields), b""
            while parts and not body.done:
                got += body.feed(parts.pop(0))
            if not body.done:
                body.close()
            return got, body.trailing_data + b"".join(parts)
        parts = [part for part in parts if part]
        if isinstance(expected, bytes):
            assert read() == (expected, rest)
        else:
            assert error_of(expected, read).status == (rest or 400)


def test_a_body_to_the_end_of_the_connection():
    body = BodyDecoder({}, until_close=True)
    assert body.feed(b"abc") == b"abc" and not body.done
    body.close()
    assert body.done
    assert BodyDecoder({}).done, "a request without a length has no body"


# == transport ================================================================================


@table({
    # name: (what happens to a kept connection, connections in all, requests for the second chat)
    "nothing": (lambda akash, kept: None, 1, 1),
    "it has ended": (lambda akash, kept: (akash.hang_up(), wait_for(lambda: not akash.open)), 2, 1),
    "it ends when the next request comes": (lambda akash, kept: akash.faults.append(akash.refuse()), 2, 2),
    "the upstream speaks unasked": (lambda akash, kept: ([sock.sendall(reply(408, b"{}")) for sock in akash.open.copy()],
                                                         wait_for(lambda: akashproxy.peek(kept))), 2, 1),
})
def test_a_kept_connection_is_used_again_while_it_can_be(happens, connections, requests, akash, serve):
    server = serve()
    assert chat(server).status == 200
    idle = server.pool.upstreams[0].controller.transport.connections.idle
    wait_for(lambda: idle)
    ((_, kept),) = idle
    happens(akash, kept)
    assert chat(server).status == 200
    assert akash.connections == connections and len(akash.bodies()) == 1 + requests


def test_a_request_is_not_sent_twice_on_a_new_connection(akash, serve):
    server = serve()
    akash.session = reply(body=b"{}", extra=b"Connection: close\r\n")
    akash.faults += [akash.refuse()] * 2
    got = chat(server)
    assert got.status == 502 and got.json["error"]["code"] == "upstream_error"
    assert len(akash.bodies()) == 1 + (akash.connections == 3)


def test_a_request_is_sent_twice_at_most(akash, serve):
    server, gate = serve(), threading.Barrier(6)
    akash.faults.extend([lambda sock, request: gate.wait(10) >= 0 and akash.answer(sock, request)] * 6)
    assert {got.status for got in at_once(lambda: chat(server), 6)} == {200}
    asked = len(akash.bodies())             # six connections are kept now, and the server closes each
    akash.faults.extend([akash.refuse()] * 6)
    assert chat(server).status == 502
    assert len(akash.bodies()) == asked + 2


def test_kept_connections_are_not_watched_and_live_as_long_as_their_server_says(akash, serve):
    server = serve()
    watched = len(server.loop.registrations)
    assert chat(server).status == 200
    connections = server.pool.upstreams[0].controller.transport.connections
    wait_for(lambda: connections.idle and not server.connections)
    assert len(server.loop.registrations) == watched
    for seconds, kept in ((3, 1), (5, 0)):
        connections.close_expired(time.monotonic() + seconds)
        assert len(connections.idle) == kept
    wait_for(lambda: not akash.open)
    assert (akashproxy.keepalive_seconds({"keep-alive": "timeout=5"}), akashproxy.keepalive_seconds({})) == (4, 30)


@pytest.mark.parametrize("text", ["a\nB: c", "a\rb", "a\r\nB: c", "a\0b"])
def test_no_line_break_gets_into_the_head_of_a_request(text):
    for fields in {"A": text}, {text: "a"}:
        request = akashproxy.UpstreamRequest("GET", "http://x/", fields, None, akashproxy.CancelScope(), None, "")
        with pytest.raises(ProtocolError, match="line break"):
            request.parts()


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
SAID = reply(body=b"ID3", kind="audio/mpeg")


@table({
    # name: (bytes, status for the client, connections for this answer and the next)
    "interim answers": (INTERIM + SAID, 200, 1),
    "interim answers without an end": (INTERIM * 51 + SAID, 502, 2),
    "204 ends with its head": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, 1),
    "204 has no body, whatever it says": (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, 1),
    "an answer to nobody behind it": (SAID + reply(body=b"evil", kind="audio/mpeg"), 200, 2),
    "an answer to nobody behind 204": (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", 204, 2),
    "it closes": (SAID.replace(b"keep-alive", b"close"), 200, 2),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nID3", 200, 2),
    "HTTP/1.2": (SAID.replace(b"1.1", b"1.2"), 502, 2),
    "HTTP/2.0": (SAID.replace(b"1.1", b"2.0"), 502, 2),
    "a status of two digits": (SAID.replace(b"200", b"20"), 502, 2),
    "a status of four digits": (SAID.replace(b"200", b"2000"), 502, 2),
    "a status that begins with 0": (SAID.replace(b"200", b"020"), 502, 2),
    "two blanks before the status": (SAID.replace(b" 200", b"  200"), 502, 2),
    "both lengths": (SAID.replace(b"Connection", b"Content-Length: 3\r\nConnection"), 502, 2),
})
def test_the_head_of_an_upstreams_answer(data, status, connections, fake, pool):
    server = known(pool(fake))
    before = fake.connections - 1               # a kept one is used
    fake.sends(data, keep=True)
    got = ask(server, "POST", "/v1/audio/speech", {"model": "both"})
    assert (got.status, got.body) == (status, {200: b"ID3", 204: b""}.get(status, got.body))
    got = ask(server, "POST", "/v1/audio/speech", {"model": "both"})
    assert (got.status, got.body[:3]) == (200, b"ID3") and fake.connections == before + connections


# == controllers: Akash =======================================================================

MULTI = "Привет, 世界！👩‍👩‍👧‍👦 🇺🇦 𝔘."
SEPARATORS = "LS[\u2028]PS[\u2029]NEL[\x85]BOM[\ufeff]DEL[\x7f]"


def sdk5(*events):
    return b"".join(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n" for event in events)


def delta(text, kind="text"):
    return {"type": kind + "-delta", "id": "0", "delta": text}


FINISH5 = {"type": "finish", "finishReason": "stop"}
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
EARLY, NO_REASON = "connection lost: it ended its answer early", "connection lost: it ended its answer without a finish reason"
UNKNOWN = b"3:\"{'error': '/chat/completions: Invalid model name passed in model=no-such-model. Call `/v1/models` to view.'}\"\n"


def decodes_cut_at_every_byte(decoder, data, expected, error):
    for parts in pieces(data):
        events, told = decoded(akashproxy.DecoderChain(decoder(), akashproxy.SurrogateFilter()), parts)
        assert merged(events) == expected, parts
        assert re.search(error, told[1]) if error else told is None


@table({
    # name: (bytes, events, what the error says)
    "text-short": (HELLO, [T("Hello from the mock."), Finish("stop")], None),
    "text-empty": (STEP + STOP, [Finish("stop")], None),
    "text-multibyte": (b'0:"' + MULTI.encode() + b'"\n' + STOP, [T(MULTI), Finish("stop")], None),
    "text-separators": (b'0:"' + SEPARATORS.encode() + b'"\n0:"NUL[\\u0000]VT[\\u000b]"\n' + STOP,
                        [T(SEPARATORS + "NUL[\0]VT[\x0b]"), Finish("stop")], None),
    "text-quotes": (b'0:"\\"hi\\" \\\\ \\\\n \\n0:\\"no\\"\\r\\n"\n' + STOP, [T('"hi" \\ \\n \n0:"no"\r\n'), Finish("stop")], None),
    "text-lonesurrogate": (b'0:"\\ud83d"\n0:"\\ude00!"\n' + STOP, [T("😀!"), Finish("stop")], None),
    "half a pair only": (b'0:"a\\ud83d"\n0:"b"\n0:"\\ude00"\n' + STOP, [T("a\ufffdb\ufffd"), Finish("stop")], None),
    "half a pair at the end": (b'0:"a\\ud83d"\n' + STOP, [T("a\ufffd"), Finish("stop")], None),
    "finish-length": (b'0:"cut"\n' + END.replace(b"%b", b"length"), [T("cut"), Finish("length")], None),
    "finish-contentfilter": (b'0:"I"\n' + END.replace(b"%b", b"content-filter"), [T("I"), Finish("content_filter")], None),
    "finish-none": (b'0:"part"\n' + END.replace(b"%b", b"unknown"), [T("part")], NO_REASON),
    "err-html200": (STEP + END.replace(b"%b", b"unknown"), [], NO_REASON),
    "usage-finalchunk": (b'0:"x"\nd:{"finishReason":"stop","usage":{"promptTokens":11,"completionTokens":7}}\n',
                         [T("x"), Finish("stop", USAGE)], None),
    "sdk4-nousage": (b'0:"x"\nd:{"finishReason":"stop"}\n', [T("x"), Finish("stop")], None),
    "sdk4-data": (b'2:[{"hello":1}]\n8:[{"note":"x"}]\n' + HELLO, [T("Hello from the mock."), Finish("stop")], None),
    "sdk4-reasoning": (b'g:"Let me"\ng:" think \\"hard\\""\n0:"42"\n' + STOP, [R('Let me think "hard"'), T("42"), Finish("stop")], None),
    "sdk4-tool-streaming": (b'b:{"toolCallId":"call_1","toolName":"w"}\nc:{"toolCallId":"call_1","argsTextDelta":"{"}\n'
                            b'9:{"toolCallId":"call_1","toolName":"w","args":{"city":"Kyiv"}}\n'
                            b'a:{"toolCallId":"call_1","result":{"t":21}}\n' + END.replace(b"%b", b"tool-calls"),
                            [ToolCall(0, '{"city":"Kyiv"}', "call_1", "w"), Finish("tool_calls")], None),
    "reasoning-tag-in-thought": (b'0:"<think>\\nI may write <think> or </think>\\n\\n x\\n</think>\\n\\n"\n0:"A"\n' + STOP,
                                 [R("I may write <think> or </think>\n\n x"), T("A"), Finish("stop")], None),
    "reasoning-late": (b'0:"First "\n0:"<think>\\nlate\\n</think>\\n\\n"\n0:"second"\n' + STOP,
                       [T("First "), R("late"), T("second"), Finish("stop")], None),
    "abort-midstream": (STEP + b'0:"one "\n0:"two "\n3:"terminated"\n', [T("one two ")], "Akash Chat: terminated"),
    "app-sigkill-midstream": (STEP + b'0:"one "\n', [T("one ")], EARLY),
    "the last line without its end": (b'0:"one"\n' + STOP[:-1], [T("one"), Finish("stop")], None),
    "a text without the end of its line": (b'0:"one "\n0:"two"', [T("one two")], EARLY),
    "the end cut within a line": (STEP + b'0:"one "\n' + STOP[:-5], [T("one ")], EARLY),
    "err-instream-continues": (b'0:"before "\n3:"[object Object]"\n0:"after"\n' + STOP, [T("before ")], "without giving a reason"),
    "err-backend-refused": (b'3:"Failed after 3 attempts. Last error: Cannot connect to API: connect ECONNREFUSED 10.0.0.7:3901"\n',
                            [], r"Akash Chat: Cannot connect to API: connect ECONNREFUSED \(address\)$"),
    "model-unknown": (UNKNOWN, [], "The model 'm' does not exist"),
    "broken JSON": (b'0:"a"\n0:"b\n' + STOP, [T("a")], "malformed line"),
    "no string": (b"0:7\n" + STOP, [], "malformed line"),
    "HTML": (b"<!DOCTYPE html><html>\n<body>busy</body></html>\n", [], "web page"),
    "HTML in one line": (b"<html>busy</html>", [], "web page"),
    "bare text": (b"Hello\nthere\n", [], "other than a stream"),
    "unknown codes": (b'z:{"a":1}\nh:[]\n' + HELLO, [T("Hello from the mock."), Finish("stop")], None),
    "sdk5-text": (sdk5({"type": "start"}, {"type": "start-step"}, {"type": "text-start", "id": "0"}, delta("Hel"), delta("lo"),
                       {"type": "text-end", "id": "0"}, {"type": "finish-step"}, FINISH5, b"[DONE]"),
                  [T("Hello"), Finish("stop")], None),
    "sdk5-reasoning": (sdk5(delta("Let", "reasoning"), delta("4"), {"type": "reasoning-end", "id": "0"}, delta("2"), FINISH5),
                       [R("Let"), T("42"), Finish("stop")], None),
    "sdk5-usage-metadata": (sdk5(delta("x"), {**FINISH5, "messageMetadata": {"totalUsage": {
        "inputTokens": 11, "outputTokens": 7, "totalTokens": 18}}}), [T("x"), Finish("stop", USAGE)], None),
    "sdk5-lonesurrogate": (sdk5(b'{"type":"text-delta","id":"0","delta":"\\ud83d"}', b'{"type":"text-delta","id":"0","delta":"\\ude00!"}',
                                FINISH5), [T("😀!"), Finish("stop")], None),
    "sdk5-separators": (sdk5(json.dumps(delta(SEPARATORS), ensure_ascii=False).encode(), FINISH5), [T(SEPARATORS), Finish("stop")], None),
    "sdk5-error-instream": (sdk5(delta("before"), {"type": "error", "errorText": "[object Object]"},
                                 {"type": "finish", "finishReason": "error"}, b"[DONE]"), [T("before")], "without giving a reason"),
    "sdk5-tool-executed": (sdk5({"type": "tool-input-start", "toolCallId": "c", "toolName": "w"},
                                {"type": "tool-input-available", "toolCallId": "c", "toolName": "w", "input": {"city": "K"}},
                                {"type": "finish", "finishReason": "tool-calls"}),
                           [ToolCall(0, '{"city":"K"}', "c", "w"), Finish("tool_calls")], None),
    "sdk5-tool-unknown": (sdk5({"type": "tool-input-error", "toolCallId": "c", "errorText": "Model tried to call unavailable tool 'w'."}),
                          [], "unavailable tool"),
    "sdk5-abort": (sdk5(delta("one ")), [T("one ")], EARLY),
    "sdk5-abort-merge": (sdk5(delta("one "), {"type": "error", "errorText": "Failed to process successful response"}, b"[DONE]"),
                         [T("one ")], "Failed to process"),
    "sdk5-finish-none": (sdk5(delta("part"), {"type": "finish", "finishReason": "unknown"}, b"[DONE]"), [T("part")], NO_REASON),
    "sdk6-finish-none": (sdk5(delta("part"), {"type": "finish", "finishReason": "other"}, b"[DONE]"), [T("part")], NO_REASON),
    "done without a finish": (sdk5(delta("part"), b"[DONE]"), [T("part")], EARLY),
    "comments": (b": hi\r\n\r\nevent: x\nid: 1\nretry: 2\n" + sdk5(delta("x"), FINISH5), [T("x"), Finish("stop")], None),
})
def test_akash_streams_cut_at_every_byte(data, expected, error):
    decodes_cut_at_every_byte(lambda: AkashDecoder("m"), data, expected, error)
    assert data is not HELLO or AkashDecoder().feed(data) == expected, "all text of one read is one event"


def pasted(prompt, negative=""):
    return (f"0:\"<image_generation> jobId='{JOB}' prompt='{prompt}' negative='{negative}'</image_generation>\"\n").encode() + STOP


@table({
    "gen-ok": (pasted("A red fox in the snow, detailed", "blurry"), "A red fox in the snow, detailed"),
    "gen-apos": (pasted("A cat\\'s hat", "it\\'s bad"), "A cat's hat"),
    "gen-dquote": (pasted('A sign saying "OPEN" at night'), 'A sign saying "OPEN" at night'),
    "gen-newline": (pasted("line one\nline two"), "line one\nline two"),
    "gen-backslash": (pasted("back\\slash and \\n text"), "back\\slash and \\n text"),
    "gen-all": (pasted('A cat\\\'s "portrait", 8k,\nsecond \\ backslash, it\\\'s 🎉 日本 </image_generation>', 'b"a\\\'d'),
                'A cat\'s "portrait", 8k,\nsecond \\ backslash, it\'s 🎉 日本 </image_generation>'),
    "a closing line within": (pasted("a'</image_generation>\"\ne"), "a'</image_generation>\"\ne"),
    "a later framing": (sdk5(delta("<image_generation> jobId='" + JOB + "' prompt='a"), delta("b' negative=''</image_generation>"), FINISH5), "ab"),
})
def test_the_answers_of_akashgen(data, prompt):
    assert akashproxy.parse_image_job(data) == (JOB, prompt) and akashproxy.parse_image_job(HELLO) is None


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
ZW = "\u2060"
MARKED_FILE = base64.b64encode("héllo <|endoftext|>".encode()).decode()


def attached(url, text=""):
    return user(text, experimental_attachments=[{"name": "picture", "contentType": "image/png", "url": url}])


@table({
    # name: (fields of the client's body, fields of Akash's body)
    "plain": ({"messages": [user("hi")]}, {"model": "m", "messages": [user("hi")], "system": " ", "temperature": 0.85, "topP": 1.0, "context": []}),
    "system and developer": ({"messages": [system("A"), user("hi"), developer("B")]}, {"system": "A\n\nB", "messages": [user("hi")]}),
    "an empty system": ({"messages": [system(""), user("hi")]}, {"system": " "}),
    "topP": ({"messages": [user("hi")], "topP": 0.5, "temperature": 1}, {"topP": 0.5, "temperature": 1}),
    "top_p": ({"messages": [user("hi")], "top_p": 0.4}, {"topP": 0.4}),
    "zero stays alive": ({"messages": [user("hi")], "top_p": 0, "temperature": 0.0}, {"topP": 1e-6, "temperature": 1e-6}),
    "null is absent": ({"messages": [user("hi")], "top_p": None, "tools": None, "n": None}, {"topP": 1.0}),
    "parts of text": ({"messages": [user([text_part("a"), text_part("b")])]}, {"messages": [user("ab")]}),
    "a picture": ({"messages": [user([text_part("look"), picture(DATA_URL)])]}, {"messages": [attached(DATA_URL, "look")]}),
    "a picture's address": ({"messages": [user([{"type": "image_url", "image_url": "https://h/x.jpg"}])]},
                            {"messages": [attached("https://h/x.jpg")]}),
    "null of the assistant": ({"messages": [user("a"), assistant(None), user("b")]}, {"messages": [user("a"), assistant(""), user("b")]}),
    "names and other fields go": ({"messages": [user("a", name="Bob")]}, {"messages": [user("a")]}),
    "req-special-endoftext": ({"messages": [user("x <|endoftext|> y")]}, {"messages": [user(
        f"x <|{ZW}endoftext|> y", parts=[text_part("x <|endoftext|> y")])]}),
    "req-special-system": ({"messages": [system("<|fim_prefix|>"), user("a")]}, {"system": f"<|{ZW}fim_prefix|>"}),
    "req-special-imstart is harmless": ({"messages": [user("<|im_start|>")]}, {"messages": [user("<|im_start|>")]}),
    "nothing asked for": ({"messages": [user("a")], "tools": [], "tool_choice": "none", "n": 1, "logprobs": False,
                           "response_format": {"type": "text"}, "modalities": ["text"]}, {"model": "m"}),
    # -- messages that OpenAI or the original answer
    "only a system message": ({"messages": [system("A poem.")]}, {"messages": [user("A poem.")], "system": " "}),
    "only developer messages": ({"messages": [developer("a"), system("b")]}, {"messages": [user("a\n\nb")], "system": " "}),
    "no content": ({"messages": [{"role": "user"}]}, {"messages": [user("")], "system": " "}),
    "null content": ({"messages": [user(None)]}, {"messages": [user("")], "system": " "}),
    "null in the system": ({"messages": [system(None), user("hi")]}, {"messages": [user("hi")], "system": " "}),
    "an answer without content": ({"messages": [user("a"), {"role": "assistant"}, user("b")]},
                                  {"messages": [user("a"), assistant(""), user("b")], "system": " "}),
    # -- files
    **{f"base 64 as browsers take it, {text!r}": ({"messages": [user([picture("data:image/png;base64," + text)])]},
                                                  {"messages": [attached("data:image/png;base64," + text)]})
       for text in ("iVBORw0KGgo=", "iVBORw0KGgo", "iVBO\nRw0K\r\n", "iV-_", "iVBO Rw==")},
    "text files": ({"messages": [user("hi"), user([text_part("Sum up."), {"type": "file", "file": {
        "filename": "a.md", "file_data": f"data:text/markdown;base64,{MARKED_FILE}"}}, {"type": "file", "file": {"file_data": MARKED_FILE}}])]},
                   {"context": [{"name": name, "content": f"héllo <|{ZW}endoftext|>"} for name in ("a.md", "file")],
                    "messages": [user("hi"), user("Sum up.")]}),
})
def test_requests_to_akash(body, expected, akash, serve):
    assert chat(serve(), {"model": "m", **body}).status == 200
    got, = akash.bodies()
    assert {name: got[name] for name in expected} == expected
    assert set(got) == {"id", "model", "messages", "system", "temperature", "topP", "context"}


@table({
    # a field that Akash can't do: (fields, param, words of the message)
    "tools": ({"tools": [{"type": "function"}]}, "tools", "does not support"),
    "functions": ({"functions": [{}]}, "functions", "does not support"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice", "does not support"),
    "n": ({"n": 2}, "n", "above 1"),
    "logprobs": ({"logprobs": True}, "logprobs", "does not support"),
    "top_logprobs": ({"top_logprobs": 3}, "top_logprobs", "does not support"),
    "response_format": ({"response_format": {"type": "json_schema"}}, "response_format", "does not support"),
    "response_format of another kind": ({"response_format": "json"}, "response_format", ""),
    "audio": ({"audio": {"voice": "x"}}, "audio", "does not support"),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities", "does not support"),
    "temperature": ({"temperature": "hot"}, "temperature", "must be a number"),
    "a temperature that is true": ({"temperature": True}, "temperature", "must be a number"),
    "a negative temperature": ({"temperature": -1}, "temperature", "at least 0"),
    "top_p": ({"top_p": [1]}, "top_p", "must be a number"),
    "role tool": ({"messages": [user("a"), {"role": "tool", "content": "x"}]}, "messages[1].role", "not 'tool'"),
    "role function": ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "not 'function'"),
    "tool_calls": ({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[1].tool_calls", "tool calls"),
    "content a number": ({"messages": [user(7)]}, "messages[0].content", "needs a string"),
    "a part of audio": ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "messages[0].content[0]", "'input_audio'"),
    "a part of nothing": ({"messages": [user([None])]}, "messages[0].content[0]", "not 'None'"),
    "a part's type a list": ({"messages": [user([{"type": []}])]}, "messages[0].content[0]", "not"),
    "a local picture": ({"messages": [user([picture("file:///etc/passwd")])]}, "messages[0].content[0]", "with http"),
    "a picture of the assistant": ({"messages": [assistant([picture(DATA_URL)])]}, "messages[0].content", "the role user only"),
    "a picture of the system": ({"messages": [system([picture(DATA_URL)]), user("hi")]}, "messages[0].content", "the role user only"),
    "no messages": ({"messages": []}, "messages", "must not be empty"),
    "a picture that is no base64": ({"messages": [user([{"type": "image_url", "image_url": "data:image/png;base64,@@@@"}])]},
                                    "messages[0].content[0]", "invalid base64"),
    "a picture cut in base64": ({"messages": [user([{"type": "image_url", "image_url": "data:image/png;base64,iVBOR"}])]},
                                "messages[0].content[0]", "invalid base64"),
    "an empty picture": ({"messages": [user([picture("data:image/png;base64,")])]}, "messages[0].content[0]", "invalid base64"),
    "a file that is no text": ({"messages": [user([{"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0A"}}])]},
                               "messages[0].content[0]", "UTF-8 text"),
    "a file by its ID": ({"messages": [user([{"type": "file", "file": {"file_id": "file-1"}}])]}, "messages[0].content[0]", "UTF-8 text"),
    "an absurd temperature": ({"temperature": 10 ** 400}, "temperature", "must be a number"),
    "absurd tokens": ({"max_tokens": 10 ** 400}, "max_tokens", "must be an integer"),
    "stop": ({"stop": 7}, "stop", "must be a string"),
    "five stops": ({"stop": list("abcde")}, "stop", "at most four"),
    "a stop of 1,001 characters": ({"stop": ["a", "x" * 1001]}, "stop", "maximum length 1000"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens a fraction": ({"max_tokens": 1.5}, "max_tokens", "must be an integer"),
    "max_completion_tokens": ({"max_completion_tokens": "9"}, "max_completion_tokens", "must be an integer"),
})
def test_what_akash_cannot_do_is_refused(fields, param, words, akash, serve):
    got = chat(serve(), **fields)
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert words in got.json["error"]["message"] and got.json["data"]["msg"] == got.json["error"]["message"]
    assert not akash.bodies()


@table({    # (fields that are dropped by a setting, fields of the client's body, what is ignored)
    "nothing": ((), {}, None),
    "what Akash has no place for": ((), {"seed": 1, "user": "u", "presence_penalty": 0.5, "frequency_penalty": None, "evil\r\nX": 1},
                                    "seed, user, presence_penalty"),
    "JSON mode": ((), {"response_format": {"type": "json_object"}}, "response_format"),
    "text": ((), {"response_format": {"type": "text"}}, None),
    "dropped before they are checked": (("tools", "tool_choice", "n"), {"tools": [{"type": "function"}], "tool_choice": "required", "n": 2},
                                        "tools, tool_choice, n"),
    "dropped stops": (("stop",), {"stop": "mock"}, "stop"),
    "dropped, and ignored": (("max_tokens",), {"max_tokens": 1, "seed": 1}, "max_tokens, seed"),
    "not there": (("tools", "n"), {"messages": [user("hi")]}, None), "null": (("tools",), {"tools": None}, None),
})
def test_what_akash_ignores_is_said(drop, fields, ignored, streamed, akash, pool):
    got = chat(pool((akash, {"drop": drop})), stream=streamed, **fields)
    assert got.status == 200 and got.headers.get("x-akashproxy-ignored") == ignored and text_of(got) == "Hello from the mock."


# == controllers: Akash's session =============================================================


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def akash_controller(akash, clock, **options):
    options = akashproxy.ControllerSettings(type="akash", name="a", base_url=akash.url, **options)
    return akashproxy.CONTROLLERS["akash"](options, Settings(akash_base_url=akash.url), clock)


def test_the_cookie_lives_for_its_max_age(akash):
    clock = Clock()
    session = akash_controller(akash, clock).session
    first, = set(at_once(session.get, 64))
    assert first == akash.cookie and akash.cookies == 1
    clock.now += 0.79 * 600
    assert session.get() == first and akash.cookies == 1
    clock.now += 0.02 * 600                 # the last fifth: the old one serves on while one thread renews
    assert session.get() == first
    wait_for(lambda: session.get() != first and not session.lock.locked())
    assert akash.cookies == 2 and session.get() == akash.cookie
    clock.now += 10000                      # over: everybody waits for a new one
    assert session.get() == akash.cookie and akash.cookies == 3
    assert all("cookie" not in request.headers for request in akash.requests), "one would extend nothing in 2026"


def test_a_failed_renewal_leaves_the_old_cookie(akash):
    clock = Clock()
    session = akash_controller(akash, clock).session
    first = session.get()
    akash.session = reply(500)
    clock.now += 500
    assert session.get() == first
    wait_for(lambda: len(akash.requests) == 2 and not session.lock.locked())
    assert session.get() == first and len(akash.requests) == 2      # not again at once
    clock.now += 20
    assert session.get() == first
    wait_for(lambda: len(akash.requests) == 3)


def test_a_failure_that_is_repeated_keeps_no_caller_in_memory():
    def fetch():
        raise APIError(503, "down")

    depth_of_a_call = lambda: len(list(akashproxy.traceback.walk_tb(error_of(APIError, cache.get).__traceback__)))
    cache = akashproxy.Cache("list", fetch)
    depth_of_a_call()
    assert depth_of_a_call() == depth_of_a_call()


def test_a_session_server_that_stalls_costs_all_one_time_out(akash, serve):
    akash.answer = akash.stall(None)
    server = serve(session_timeout=0.3)
    assert {got.status for got in at_once(lambda: chat(server), 6)} == {504} and len(akash.requests) < 6


@pytest.mark.parametrize("path", ["/api/auth/session/", "/api/models/"])
def test_an_endless_session_or_model_list_is_one_that_does_not_come(path, akash, serve):
    akash.answers(path, akash.endless(reply(body=b"")[:-5], chunk(b" "), pause=0.05))
    server, started = serve(session_timeout=0.2), time.monotonic()
    got = ask(server, path="/v1/models") if "models" in path else chat(server)
    assert (got.status, got.json["error"]["code"]) == (504, "timeout") and "within 0.2 seconds" in got.json["error"]["message"]
    assert time.monotonic() - started < 5 and akash.gone.wait(20)


def test_a_client_that_leaves_while_others_fetch_the_session(akash, serve):
    akash.answer = akash.stall(None)
    server = serve()
    with crowd(server, 3):
        wait_for(lambda: sum(bool(connection.request) for connection in server.connections.copy()) == 3)
    wait_for(lambda: len(server.connections) == 1)    # the one that fetches does so for all
    akash.close()


@table({
    "none": ("", ""),
    "a fixed word": ("session_token=validated; Path=/; Max-Age=86400", "session_token=validated"),
    "empty": ("session_token=; Max-Age=1", ""),
    "another cookie first": ("a=b\nsession_token=ff; max-age=9 ;Secure", "session_token=ff"),
    "no life told": ("session_token=ff", "session_token=ff"),
    "another name": ("xsession_token=ff", ""),
})
def test_any_cookie_is_taken(set_cookie, expected, akash):
    clock = Clock()
    session = akash_controller(akash, clock).session
    akash.session = reply(body=b"{}", extra="".join(f"Set-Cookie: {line}\r\n" for line in set_cookie.split("\n")).encode())
    assert session.get() == session.get() == expected and len(akash.requests) == 1


def test_a_server_without_sessions_is_no_error(akash, serve):
    akash.session = reply(body=b'{"success":true}')
    server = serve(akash_cookie="a=b")
    assert chat(server).status == chat(server).status == 200
    assert [request.headers.get("cookie") for request in akash.requests] == ["a=b", "a=b", "a=b"]


def test_an_expired_session_is_renewed_once_even_if_its_connection_ends_with_it(akash, serve):
    server = serve(akash_cookie="a=b")
    assert chat(server).status == 200
    for faults in ([], [akash.refuse()]):
        akash.faults += faults
        akash.cookies += 10                     # the server knows our cookie no more, as after a restart
        assert chat(server).status == 200
        assert akash.requests[-1].headers["cookie"] == akash.cookie + "; a=b"


def test_a_session_that_stays_invalid_is_no_loop(akash, serve):
    akash.faults += [akash.raw(reply(403, BAD_SESSION), keep=True)] * 9
    server = serve()
    got = chat(server)
    assert (got.status, got.json["error"]["code"], got.headers["retry-after"]) == (503, "upstream_session", "5")
    assert len(akash.bodies()) == 2 and akash.cookies == 2
    assert ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] <= 1, "the server's sessions are lost, not our access"


@table({    # the answer to a request for a session: what a client is told, Retry-After
    "a redirect": (reply(301, b"", "", b"Location: https://elsewhere.example/\r\n"),
                   "redirects to https://elsewhere.example/, check AKASH_BASE_URL", None),
    "down": (reply(500, b"", ""), "did not start a session", "5"),
})
def test_a_session_that_is_not_started_is_said(answer, words, retry_after, akash, serve):
    akash.session = answer
    got = chat(serve())
    assert got.status == 503 and words in got.json["error"]["message"] and retry_after in (None, got.headers["retry-after"])


@pytest.mark.parametrize("accepted", ["plain", "sha256"])
def test_access_tokens_of_both_versions(akash, serve, accepted):
    refusal = akash.raw(reply(403, b'{"error":"Invalid Access token","message":"The provided access token is invalid"}'), keep=True)
    tokens, honest = ["t0ken", hashlib.sha256(b"t0ken").hexdigest()], akash.answer
    akash.answers("session", lambda sock, request: (
        honest if request.headers.get("authorization") == f"Bearer {token}" else refusal)(sock, request))
    server = serve(akash_access_token="t0ken")
    for token in tokens if accepted == "plain" else reversed(tokens):     # then the server changes its mind
        akash.cookies += 10
        assert chat(server).status == 200
    got = chat(serve(akash_access_token="wrong"))
    assert got.status == 424 and "AKASH_ACCESS_TOKEN" in got.json["error"]["message"]
    assert "wrong" not in got.body.decode()
    assert "authorization" not in akash.requests[-1].headers or "session" in akash.requests[-1].path


# == controllers: Akash's logins and allowances ================================================


def signed_in(*cookies):
    extra = "".join(f"set-cookie: {cookie}; Path=/; HttpOnly; Secure; SameSite=lax\r\n" for cookie in cookies)
    return reply(body=b'{"sub":"auth0|7"}', extra=extra.encode())


SIGNED_OUT = b"HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n"


@table({    # Set-Cookie of the answer: the cookie that is sent from then on
    "a new one": (["appSession=two"], "cf_clearance=x; appSession=two"),
    "in two parts": (["appSession.0=two", "appSession.1=three", "appSession=; Max-Age=0"], "cf_clearance=x; appSession.0=two; appSession.1=three"),
    "none": ([], "appSession=one; cf_clearance=x"), "others": (["session_token=x", "appSessions=y"], "appSession=one; cf_clearance=x"),
})
def test_a_login_is_kept_alive(set_cookie, expected, akash):
    clock, akash.me = Clock(), signed_in(*set_cookie)
    controller = akash_controller(akash, clock, cookie="appSession=one; cf_clearance=x")
    for _ in range(3):
        controller.on_tick(0)
    wait_for(lambda: controller.status() == {"login": "active"})
    assert [(asked.method, asked.path, asked.headers["cookie"]) for asked in akash.requests] == [
        ("GET", "/api/auth/me/", "appSession=one; cf_clearance=x")]
    assert controller.login.cookie == controller.transport.headers["Cookie"] == expected
    clock.now += 4 * 3600
    controller.on_tick(0)
    wait_for(lambda: len(akash.requests) == 2)
    assert akash.requests[1].headers["cookie"] == expected and controller.metrics()["akashproxy_login_active"] == 1


@table({    # the answer to the question for a login: (its status, the metric, the seconds until it is asked again)
    "signed out": (SIGNED_OUT, "ended", 0, 4 * 3600), "no logins there": (reply(401, b"null"), "ended", 0, 4 * 3600),
    "July": (None, "unknown", None, 301), "down": (reply(500), "unknown", None, 301),
    "a challenge": (reply(200, b"<html>", "text/html"), "unknown", None, 301),
})
def test_a_login_that_has_ended_is_reported_once_and_one_that_cant_be_checked_is_not(answer, status, metric, pause, akash, caplog):
    clock, akash.me = Clock(), answer
    controller = akash_controller(akash, clock, cookie="appSession=one")
    for number in range(1, 4):
        controller.on_tick(0)
        controller.on_tick(0)
        wait_for(lambda: len(akash.requests) == number and controller.status() == {"login": status})
        clock.now += pause
    assert caplog.text.count("a: its login has ended: set a new cookie") == caplog.text.count("WARNING") == (status == "ended")
    assert controller.metrics().get("akashproxy_login_active") == metric and "one" not in caplog.text.split()


def test_no_login_is_asked_about_none(akash):
    controller = akash_controller(akash, Clock(), cookie="cf_clearance=x; myappSession=y")
    controller.on_tick(0)
    assert controller.status() == {"login": None} and controller.login.renew_at == -math.inf


def test_several_logins_in_one_pool(pool):
    a, b = FakeAkash(), FakeAkash()
    limited = reply(429, b'{"error":"Rate limit exceeded","message":"You have used it up"}', extra=b"retry-after: 9\r\n")
    a.sends(limited, keep=True)
    a.me, b.me = signed_in("appSession=renewed"), SIGNED_OUT
    server = pool((a, {"cookie": "appSession=one"}), (b, {"headers": {"cookie": "appSession=two"}}), akash_cookie="appSession=other")
    controllers = lambda: ask(server, path="/status").json["controllers"]
    wait_for(lambda: [each["login"] for each in controllers()] == ["active", "ended"])
    for _ in range(3):
        assert chat(server).status == 200
    sent = lambda fake: {asked.headers["cookie"].partition("; ")[2] for asked in fake.requests if asked.method == "POST"}
    assert (sent(a), sent(b)) == ({"appSession=renewed"}, {"appSession=two"}) and len(b.bodies()) == 3
    assert [each["rests_for_seconds"] > 0 for each in controllers()] == [True, False]
    text = ask(server, path="/metrics").body.decode()
    assert 'akashproxy_login_active{controller="a"} 1' in text and 'akashproxy_login_active{controller="b"} 0' in text


@table({  # the answer to /api/rate-limit/status/: (whether the cool-down ends, whether a request may probe at once)
    "used up": (reply(body=b'{"usagePercentage":100,"blocked":true,"resetTime":"2026-11-22T00:26:06.710Z"}'), False, False),
    "reset": (reply(body=b'{"usagePercentage":0,"remainingPercentage":100,"blocked":false,"authenticated":false}'), True, False),
    "July": (None, False, True), "down": (reply(500, b'{"blocked":false}'), False, True), "odd": (reply(body=b'{"blocked":"no"}'), False, True),
})
def test_a_limit_that_has_been_reset_is_noticed(answer, ends, may_probe, akash):
    akash.limits, clock = answer, Clock()
    options = akashproxy.ControllerSettings(type="akash", base_url=akash.url)
    pool = akashproxy.Pool(Settings(controllers=(options,)), clock=clock)
    upstream = pool.upstreams[0]
    upstream.record_result(akashproxy.APIError(429, "used up", retry_after=14400), clock.now, clock.now, "m")
    pool.on_tick(0)
    assert upstream.available_at() == clock.now + 14400 and not akash.requests, "not at once"
    for number in (1, 2):
        clock.now += 601
        limit = upstream.cooldowns[akashproxy.Category.RATE_LIMIT, ""]
        pool.on_tick(0)
        pool.on_tick(0)
        wait_for(lambda: upstream.available_at() == 0 if ends else limit.asks_upstream is not may_probe)
        wait_for(lambda: len(akash.requests) == (number if not (ends or may_probe) else 1))
        assert upstream.recheck("m", (), clock.now) is may_probe
    assert {asked.path for asked in akash.requests} == {"/api/rate-limit/status/"}


# == controllers: Akash's models and pictures =================================================


@table({
    "2025": ([{"id": "a", "available": True}, {"id": "b/c", "available": False}, {"id": "AkashGen"}], ["a", "AkashGen"]),
    "2026": ([{"id": "a", "model_id": "a", "api_id": "x/a", "available": True, "temperature": "0.60"}], ["a"]),
    "models-all": ({"models": [{"id": "be11f1b5-1886", "model_id": "DeepSeek-V3.1"}], "stats": {}}, ["DeepSeek-V3.1"]),
    "OpenAI's": ({"object": "list", "data": [{"id": "a"}, {"id": "a"}]}, ["a"]),
    "empty": ([], []), "null": (None, []), "text": ("x", []), "odd entries": ([None, 7, {"id": 7}, {}], []),
})
def test_every_shape_of_a_model_list(listing, names):
    assert list(akashproxy.akash_models(listing)) == names


def test_models(akash, serve):
    server = serve()
    got = ask(server, path="/v1/models").json
    assert [model["id"] for model in got["data"]] == ["Meta-Llama-3-3-70B-Instruct", "Qwen/Qwen3", "AkashGen"]
    assert got["object"] == "list" and got["data"][1] == {
        "id": "Qwen/Qwen3", "object": "model", "created": 1626777600, "owned_by": "Akash Network", "permission": None,
        "root": "Qwen/Qwen3", "parent": None}
    for path in ("/v1/models/Qwen/Qwen3", "/v1/models/Qwen%2FQwen3"):
        assert ask(server, path=path).json == got["data"][1]
    missing = ask(server, path="/v1/models/nope")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
    assert sum("models" in request.path for request in akash.requests) == 1, "the list is kept"


def test_an_empty_list_is_an_outage_and_the_last_good_one_serves_on(akash):
    clock = Clock()
    controller = akashproxy.AkashController(akashproxy.ControllerSettings(type="akash", base_url=akash.url), Settings(), clock)
    good, akash.models = akash.models, []
    assert error_of(APIError, controller.models).status == 503
    akash.models = good
    with pytest.raises(APIError):
        controller.models()         # it is not asked again at once
    clock.now += 16
    first = controller.models()
    assert len(first) == 3
    akash.models = []
    clock.now += 601
    assert controller.models() == first
    akash.models = [{"id": "new"}]
    assert controller.models() == first, "it is not asked again at once"
    clock.now += 16
    assert [model["id"] for model in controller.models()] == ["new"]


GEN = {"model": "AkashGen", "messages": [user("a cute anime girl with blue eyes")]}
QUEUE = [{"job_id": JOB, "status": "waiting", "queue_position": 1, "result": None},
         {"job_id": JOB, "status": "waiting", "queue_position": 1, "result": None},
         {"job_id": JOB, "status": "pending", "queue_position": 0, "result": None}]


def test_a_picture_through_chat_as_the_original_gave_it(akash, serve):
    akash.chat = PICTURE_LINE
    akash.states.extend(QUEUE)
    server = serve()
    got = chat(server, GEN)
    assert got.status == 200 and got.json["code"] == 200
    assert got.json["data"] == {"model": "AkashGen", "jobId": JOB, "prompt": "A red fox in the snow",
                                "pic": f"{akash.url}/api/image/job_51083a4c_00001_.png"}
    assert got.json["object"] == "chat.completion" and got.json["usage"]["estimated"] is True
    assert text_of(got) == f"![A red fox in the snow]({server.url}/images/job_51083a4c_00001_.png)"
    akash.states.extend(QUEUE)
    assert stream(server, GEN) == (text_of(got), "The image is waiting, 1 before it.\nThe image is pending.\n", "stop", None)


def test_images(akash, serve):
    akash.chat = PICTURE_LINE
    server = serve(public_url="https://pictures.example/api/")
    got = ask(server, "POST", "/v1/images/generations", {"prompt": "a fox", "size": "512x512", "n": 2})
    assert got.status == 200 and got.headers["x-akashproxy-ignored"] == "size"
    assert got.json["data"] == [{"url": "https://pictures.example/api/images/job_51083a4c_00001_.png", "revised_prompt": "A red fox in the snow"}] * 2
    assert isinstance(got.json["created"], int) and len(akash.bodies()) == 2
    assert akash.bodies()[0]["messages"] == [user("a fox")]
    got = ask(server, "POST", "/v1/images/generations", {"prompt": "a fox", "response_format": "b64_json"})
    assert base64.b64decode(got.json["data"][0]["b64_json"]) == PNG and "url" not in got.json["data"][0]


def test_the_relay_of_a_picture(akash, serve):
    server = serve()
    got = ask(server, path="/images/job_51083a4c_00001_.png")
    assert (got.status, got.body, got.headers["content-type"]) == (200, PNG, "image/png")
    assert got.headers["x-content-type-options"] == "nosniff" and "sandbox" in got.headers["content-security-policy"]
    assert ask(server, "HEAD", "/images/job_51083a4c_00001_.png").body == b""
    for name in ("missing.png", "..", "a%2Fb", "a/b", "%2e%2e", "a%0d%0ab", "x" * 300, "%C3%BC.png", ".htaccess"):
        assert ask(server, path="/images/" + name).status == 404, name
    assert {request.path for request in akash.requests} == {"/api/image/job_51083a4c_00001_.png", "/api/image/missing.png"}
    akash.name = "noext"
    assert ask(server, path="/images/noext").status == 404 and akash.requests[-1].path == "/api/image/noext/"
    akash.answer = akash.raw(reply(body=b"<script>", kind="text/html"), keep=True)
    assert ask(server, path="/images/x.png").status == 404, "a web page is never relayed as a picture"


@table({
    # name: (what the chat says, the job's states, status, words)
    "failed": (PICTURE_LINE, [{"status": "failed", "result": "Failed: CUDA out of memory at 10.1.2.3:80"}], 502,
               "CUDA out of memory at (address)"),
    "an older form": (PICTURE_LINE, [{"status": "completed", "result": "Failed to make it"}], 502, "Failed to make it"),
    "lost": (PICTURE_LINE, ["Job not found: nope"] * 3, 502, "lost"),
    "lost, with errors": (PICTURE_LINE, [[]] * 3, 502, "lost"),
    "a bad name": (PICTURE_LINE, [{"status": "succeeded", "result": "/api/image/.."}], 502, "name"),
    "no end": (PICTURE_LINE, [{"status": "waiting", "queue_position": 9}] * 10000, 504, "not ready"),
    "not started": (pasted("x").replace(JOB.encode(), b"undefined"), [], 502, "could not start"),
    "an endless answer": (b"x" * (5 << 20), [], 502, "sent more than 4194304 bytes"),
})
def test_pictures_that_fail(said, states, status, words, akash, serve):
    akash.chat = said
    akash.states.extend(states)
    server = serve(image_timeout=0.1 if status == 504 else 20)
    for ask_it in (lambda: chat(server, GEN), lambda: ask(server, "POST", "/v1/images/generations", {"prompt": "x"})):
        if not akash.states:
            akash.states.extend(states)
        got = ask_it()
        assert got.status == status and words in got.json["error"]["message"]


@table({    # (answers to the question for a picture's state, states)
    "errors": ([(b"HTTP/1.1 200", False), (reply(500), True), (reply(502), True), (b"", False)], []),
    "lost states": ([], [[], [], QUEUE[0], "Job not found", []]),
})
def test_hiccups_while_a_picture_is_made_are_forgiven(faults, states, akash, serve):
    akash.chat = PICTURE_LINE
    akash.states.extend(states)
    akash.faulty = lambda request: "image-status" in request.path
    akash.faults.extend(akash.raw(data, keep) for data, keep in faults)
    assert chat(serve(), GEN).status == 200 and not akash.faults


def test_text_instead_of_a_picture(akash, serve):
    akash.chat = b'0:"<think>\\nhm\\n</think>\\n\\n"\n0:"Which fox?"\n' + STOP
    server = serve()
    assert text_of(chat(server, GEN)) == "Which fox?"
    got = ask(server, "POST", "/v1/images/generations", {"prompt": "x"})
    assert got.status == 400 and "Which fox?" in got.json["error"]["message"]


def test_a_picture_by_another_name_of_its_model(akash, pool):
    server = pool((akash, {"model_map": {"dall-e-3": "AkashGen"}}), image_poll=0.01)
    akash.chat = PICTURE_LINE
    got = ask(server, "POST", "/v1/images/generations", {"model": "dall-e-3", "prompt": "a fox"})
    assert got.status == 200 and got.json["data"][0]["url"].endswith(akash.name)
    assert "![A red fox in the snow](" in text_of(chat(server, {**GEN, "model": "dall-e-3"}))
    assert {body["model"] for body in akash.bodies()} == {"AkashGen"}
    akash.chat = UNKNOWN.replace(b"no-such-model", b"AkashGen")
    assert chat(server, {**GEN, "model": "dall-e-3"}).json["error"]["code"] == "image_failed"


@pytest.mark.parametrize("version", ["2026", "2025"])
def test_words_that_akash_does_not_pass_on_are_no_failure(version, akash, serve):
    head = b"Cross-Origin-Resource-Policy: same-origin\r\n" if version == "2026" else b""
    akash.faults += [akash.raw(reply(200, UNKNOWN.replace(b"no-such-model", b"AkashGen"), "text/plain", head), keep=True)] * 9
    server = serve()
    for got in (chat(server, GEN), ask(server, "POST", "/v1/images/generations", {"prompt": "thanks!"})):
        assert (got.status, got.json["error"]["code"]) == ((400, "no_image") if version == "2026" else (502, "image_failed"))
    assert len(akash.bodies()) == 2 and ask(server, path="/status").json["controllers"][0]["failed"] == (0 if version == "2026" else 2)


def test_failed_images_are_not_repeated_and_leave_chats_alone(akash, serve):
    server = serve()
    akash.faults += [akash.raw(reply(500, b'{"error":"Error generating image","message":"No workers at http://inner:1/x"}'), keep=True)] * 4
    for _ in range(4):
        got = chat(server, GEN)
        assert (got.status, got.json["error"]["code"], got.headers["x-should-retry"]) == (502, "image_failed", "false") and b"inner" not in got.body
    assert chat(server).status == 200 and ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] == 0


DRAW, WAITING = {"prompt": "a fox", "n": 2}, [{"status": "waiting", "queue_position": 1}]


def drawing(server, akash, *headers):
    """Ask for images, and leave once their jobs have been started."""
    akash.chat, before = PICTURE_LINE, len(akash.bodies())
    akash.states.extend(WAITING * 100000)
    with connect(server, post("/v1/images/generations", DRAW, *headers)):
        wait_for(lambda: len(akash.bodies()) == before + 2 and len(akash.states) < 100000 - 1)
    wait_for(lambda: server.running_calls() == 0)
    akash.states.clear()


@table({  # (the first request's key, the second one and its key): the jobs of both
    "the same": ("a", DRAW, "a", 2), "another prompt": ("a", {**DRAW, "prompt": "a dog"}, "a", 4),
    "another key": ("a", DRAW, "b", 4), "fewer": ("a", {"prompt": "a fox"}, "a", 3),
})
def test_a_repeat_joins_the_jobs_of_a_request_that_was_left(first, body, second, jobs, akash, serve):
    server = serve(keys=keys("a", "b"))
    drawing(server, akash, f"Authorization: Bearer {first}-key")
    for number in (jobs, jobs + body.get("n", 1)):      # once its images are sent, the same prompt gives others
        got = ask(server, "POST", "/v1/images/generations", body, bearer(second))
        assert len(got.json["data"]) == body.get("n", 1) and len(akash.bodies()) == number


def test_a_repeat_joins_while_the_job_is_being_started(akash, serve):
    server, asked, go_on = serve(), threading.Event(), threading.Event()
    akash.faults.append(akash.steps(asked.set, go_on, STREAM_HEAD + chunks(PICTURE_LINE)))
    with connect(server, post("/v1/images/generations", {"prompt": "a fox"})):
        assert asked.wait(20)
    wait_for(lambda: all(link.request and link.request.cancellation.reason for link in server.connections.copy()))
    repeat = later(ask, server, "POST", "/v1/images/generations", {"prompt": "a fox"})
    wait_for(lambda: any(link.request and not link.request.cancellation.reason for link in server.connections.copy()))
    go_on.set()
    assert repeat.result().status == 200 and len(akash.bodies()) == 1


@pytest.mark.parametrize("count", [1, 4])
def test_a_repeat_joins_jobs_that_took_too_long_one_each(count, akash, serve):
    server = serve(image_timeout=0.2)
    akash.chat = PICTURE_LINE
    akash.states.extend(WAITING * 10000)
    assert {(got.status, got.headers["x-should-retry"]) for got in at_once(lambda: chat(server, GEN), count)} == {(504, "true")}
    akash.states.clear()
    assert {got.status for got in at_once(lambda: chat(server, GEN), count)} == {200} and len(akash.bodies()) == count
    assert chat(server, GEN).status == 200 and len(akash.bodies()) == count + 1


def test_a_repeat_goes_to_the_controller_with_its_jobs(pool):
    a, b = FakeAkash(), FakeAkash()
    server = pool(a, b, image_poll=0.01)
    b.chat = PICTURE_LINE
    drawing(server, a)
    got = ask(server, "POST", "/v1/images/generations", DRAW)
    assert route_of(got) == "a=200" and (len(a.bodies()), len(b.bodies())) == (2, 0)
    assert route_of(ask(server, "POST", "/v1/images/generations", DRAW)) == "b=200"


def test_jobs_are_kept_for_a_repeat_without_the_request(akash, serve):
    def calls():
        gc.collect()
        return {id(call) for call in gc.get_objects() if type(call) is Call}

    server, before = serve(), calls()
    drawing(server, akash)
    wait_for(lambda: not calls() - before)


def test_image_jobs_are_kept_for_a_while_and_not_without_end():
    clock = Clock()
    batches = akashproxy.AkashImages(None, clock)

    def call_of(number):
        call = akashproxy.Call({"model": "AkashGen"})
        call.client = str(number)
        return call

    for number in range(1500):
        batches.join(call_of(number)).cancellation = None
    assert len(batches.batches) == 1000 and batches.find(call_of(0)) not in batches.batches and batches.find(call_of(1499)) in batches.batches
    clock.now += 601
    assert batches.find(call_of(1499)) not in batches.batches


# == controllers: Akash's failures ============================================================

RESET = int(time.time()) + 7000
RATE = (b'{"error":"Rate limit exceeded","message":"You\'ve reached your usage limit.",'
        b'"resetTime":"2026-11-21T20:30:20.627Z","requiresVerification":false,"tier":"anonymous"}')
PAGE = b"<!DOCTYPE html><html><title>Just a moment...</title></html>"
UPSTREAM = {
    # name: (what the chat path answers, status, code, words, further headers)
    "rl-429": (reply(429, RATE, extra=b"x-tokenlimit-reset: %d\r\n" % RESET), 429, "rate_limit_exceeded", "usage limit", {"retry-after": "^69|^7000"}),
    "a 429 with Retry-After": (reply(429, b"{}", extra=b"Retry-After: 17\r\n"), 429, "rate_limit_exceeded", "", {"retry-after": "^17$"}),
    "model-unknown-403": (reply(403, b'{"error":"Model not available","message":"x","available_models":[{"id":"a"}]}'),
                          500, "model_not_found", "does not exist", {"x-should-retry": "false"}),
    "chat-models-backend-500": (reply(403, b'{"error":"Model not available","available_models":[]}'), 503, "upstream_error", "no models", {}),
    "model-unknown": (STREAM_HEAD + chunks(UNKNOWN), 500, "model_not_found", "does not exist", {"x-should-retry": "false"}),
    "err-429": (STREAM_HEAD + chunk(b'3:"Failed after 3 attempts. Last error: Rate limit exceeded for model. Try again later."\n')
                + b"0\r\n\r\n", 429, "rate_limit_exceeded", "Rate limit exceeded for model", {}),
    "err-400": (STREAM_HEAD + chunks(b'3:"This model\'s maximum context length is 8192 tokens."\n'), 400, "context_length_exceeded", "8192", {}),
    "err-500": (STREAM_HEAD + chunks(b'3:"Failed after 3 attempts. Last error: Internal Server Error"\n'), 502, "upstream_error", "Internal", {}),
    "req-long-system-400": (reply(400, b"[Message too long for this model.]", "text/plain"), 400, "context_length_exceeded", "too long", {}),
    "req-badjson": (reply(500, b"", ""), 502, "upstream_error", "without giving a reason", {}),
    "gen-imgbackend-error-500": (reply(500, b'{"error":"Error generating image","message":"No workers available"}'), 502, "image_failed", "No workers", {}),
    "a page with 403": (reply(403, PAGE, "text/html"), 502, "upstream_blocked", "web page", {}),
    "a challenge with 503": (reply(503, PAGE, "text/html; charset=utf-8", b"cf-mitigated: challenge\r\n"), 502, "upstream_blocked", "web page", {}),
    "a page with 502": (reply(502, b"<html><title>502 Bad Gateway</title>", "text/html"), 503, "upstream_error", "without giving a reason (status 502)", {}),
    "a page with 503": (reply(503, b"<html>", "text/html", b"Retry-After: 30\r\n"), 503, "upstream_error", "(status 503)", {"retry-after": "^30$"}),
    "a page with 429": (reply(429, b"<html>", "text/html", b"Retry-After: 30\r\n"), 429, "rate_limit_exceeded", "too many", {"retry-after": "^30$"}),
    "a page with 200": (reply(200, PAGE, "text/html"), 502, "upstream_blocked", "web page", {}),
    "a page as text": (reply(200, PAGE, "text/plain"), 502, "upstream_blocked", "web page", {}),
    "cf-mitigated": (reply(403, b"{}", extra=b"cf-mitigated: challenge\r\n"), 502, "upstream_blocked", "web page", {}),
    "chat-noslash-308": (reply(308, b"/api/chat/", extra=b"location: /api/chat/\r\n"), 502, "upstream_error", "308", {}),
    "a redirect elsewhere": (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", 502, "upstream_error", "302", {}),
    "a front server's 413": (reply(413, b"<html><h1>413 Request Entity Too Large</h1>", "text/html"), 413, "request_too_large", "", {"x-should-retry": "false"}),
    "401": (reply(401, b'{"error":"Unauthorized"}'), 424, "upstream_auth", "denied access", {"x-should-retry": "false"}),
    "garbage": (b"\x16\x03\x01\x02garbage", 502, "upstream_error", "not HTTP", {}),
    "SSH": (b"SSH-2.0-OpenSSH\r\n", 502, "upstream_error", "not HTTP", {}),
    "nothing": (b"", 502, "upstream_error", "broke off", {}),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-T", 502, "upstream_error", "broke off", {}),
    "both lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 502, "upstream_error", "", {}),
    "a broken chunk": (STREAM_HEAD + b"zz\r\n", 502, "upstream_error", "broke off", {}),
    "a 200 that is empty": (reply(200, b"", "text/plain"), 502, "upstream_error", EARLY, {}),
}


@table(UPSTREAM)
def test_failures_before_the_first_word_are_statuses(data, status, code, words, headers, streamed, akash, serve):
    akash.sends(data)
    akash.sends(data)
    got = chat(serve(), stream=streamed)
    assert (got.status, got.json["error"]["code"]) == (status, code), got.body
    assert words in got.json["error"]["message"] and list(got.json) == ["error", "code", "data"]
    assert got.json["code"] == status and "<" not in got.body.decode()
    for name, pattern in headers.items():
        assert re.match(pattern, got.headers[name]), got.headers
    assert got.json["data"]["msg"] == ("Error Model." if code == "model_not_found" else got.json["error"]["message"])


@pytest.mark.parametrize("path", ["/api/auth/session/", "/api/models/"])
@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_page_in_front_of_the_session_or_the_models(path, status, akash, serve):
    akash.answers(path, akash.raw(reply(status, PAGE, "text/html"), keep=True))
    got = ask(serve(), path="/v1/models")
    assert got.status == 502 and got.json["error"]["code"] == "upstream_blocked" and b"<" not in got.body
    assert got.json["error"]["message"].startswith("127.0.0.1: A proxy in front"), "no port: clients need not know the inner network"


@pytest.mark.parametrize("status, kind, extra, wait, rests", [
    (429, "application/json", b"Retry-After: 120\r\n", "120", 120), (503, "text/html", b"Retry-After: 90\r\n", "90", 90),
    (500, "", b"", "5", 1), (502, "text/html", b"", "5", 1)])
def test_a_session_that_is_refused_for_a_time(status, kind, extra, wait, rests, akash, pool):
    akash.session = reply(status, b"", kind, extra)
    server = pool(akash, FakeAkash())
    got = ask(server, path="/v1/models") and [chat(server) for _ in range(2)]
    assert {answer.status for answer in got} == {200}
    assert math.isclose(ask(server, path="/status").json["controllers"][0]["rests_for_seconds"], rests, abs_tol=1)
    alone = chat(pool(akash))
    assert (alone.status, alone.headers["retry-after"], alone.json["error"]["code"]) == (503, wait, "upstream_session")


def test_endless_texts_of_errors_cost_nothing(akash, serve):
    for text in ("a-" * 200000, "deadbeef" * 100000, "model " * 100000, "1." * 200000, "x" * 500000 + ":80"):
        assert len(akashproxy.akash_error("Invalid prompt: " + text, "m").message) < 400
        assert len(akashproxy.first_line(text, [])) < 2000


@pytest.mark.parametrize("path", ["", "/", "/a/path", "/a/path/"])
def test_addresses_of_the_upstream(path, akash, serve):
    answer = akash.answer
    prefix = path.rstrip("/")

    def strict(sock, request):
        assert request.path.startswith(prefix + "/api/")
        return answer(sock, request._replace(path=request.path[len(prefix):]))

    akash.answer = strict
    assert chat(serve(**dataclasses.asdict(Settings.load({"AKASH_BASE_URL": akash.url + path}, {"server_address": "127.0.0.1:0"})))).status == 200


def test_what_the_upstream_is_sent(akash, serve):
    assert chat(serve(user_agent="me/1"), headers={"X-Forwarded-For": "1.2.3.4", "Cookie": "c=d"}).status == 200
    session, request = akash.requests
    assert (session.method, session.path, request.path) == ("GET", "/api/auth/session/", "/api/chat/")
    for asked in (session, request):
        assert asked.headers["user-agent"] == "me/1" and asked.headers["accept-encoding"] == "identity"
        assert not {"sec-fetch-site", "x-forwarded-for", "origin"} & set(asked.headers)
    assert request.headers["cookie"] == akash.cookie and request.headers["content-type"] == "application/json"


def test_stop_and_length_end_the_upstream_request(akash, serve):
    server = serve()
    for fields, lines, text, finish in (({"stop": ["X", "END"]}, b'0:"abcE"\n0:"NDdef"\n', "abc", "stop"),
                                        ({"max_tokens": 2}, b'0:"0123456789"\n0:"0123456789"\n', "0123456789012345", "length"),
                                        ({"max_completion_tokens": 1, "max_tokens": 9}, b'0:"0123456789"\n', "01234567", "length")):
        for ask_it in (lambda: stream(server, **fields)[:3:2], lambda: (
                lambda choice: (choice["message"]["content"], choice["finish_reason"]))(chat(server, **fields).json["choices"][0])):
            akash.gone.clear()
            akash.faults.append(akash.stall(lines))
            assert ask_it() == (text, finish)
            wait_for(akash.gone.is_set, 3)      # a kept one would be closed after 4


# == dialects =================================================================================


def test_a_chat_as_the_original_gave_it(akash, serve):
    akash.chat = b'0:"Hello! I\'m doing well."\nd:{"finishReason":"stop","usage":{"promptTokens":11,"completionTokens":7}}\n'
    before = int(time.time())
    got = chat(serve(), temperature=0.85, topP=1.0)
    assert got.status == 200 and got.json.pop("id").startswith("chatcmpl-") and before <= got.json.pop("created") <= time.time()
    assert got.json == {"object": "chat.completion", "model": CHAT["model"], "choices": [{
        "index": 0, "message": {"role": "assistant", "content": "Hello! I'm doing well.", "refusal": None},
        "logprobs": None, "finish_reason": "stop"}], "usage": USAGE}
    assert {name: akash.bodies()[0][name] for name in ("temperature", "topP")} == {"temperature": 0.85, "topP": 1.0}


def test_the_chunks_of_a_stream(akash, serve):
    akash.chat = b'0:"a"\nd:{"finishReason":"length","usage":{"promptTokens":11,"completionTokens":7}}\n'
    server = serve()
    got = chat(server, stream=True, stream_options={"include_usage": True})
    assert (got.headers["cache-control"], got.headers["x-accel-buffering"]) == ("no-cache, no-transform", "no")
    assert got.headers["transfer-encoding"] == "chunked"
    events = sse(got.body)
    assert [event["choices"] for event in events] == [
        [{"index": 0, "delta": assistant(""), "finish_reason": None}],
        [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
        [{"index": 0, "delta": {}, "finish_reason": "length"}], []]
    assert [event["usage"] for event in events] == [None, None, None, USAGE]
    for event in sse(chat(server, stream=True).body):
        assert "usage" not in event and event["choices"]
    akash.chat = HELLO
    events = sse(chat(server, stream=True, stream_options={"include_usage": True}).body)
    assert all(event["choices"] and event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["estimated"] is True, "unknown usage is estimated"


@pytest.mark.parametrize("before", [b"", b'0:"a"\n', b'0:"a', b'0:"a\\ud83d"\n', b'0:"<think>"\n', b'0:"<think>"\n0:"a</think>"\n',
                                    b'0:"a"\n0:"`<"\n', b'0:"a"\n0:"`"\n', b'0:"a"\n' + STOP])
@pytest.mark.parametrize("piece", [b'0:"b c"\n', b'0:"b', b'0:"b"', b'0:""\n', b'0:"\xc3\xa9"\n', b'0:"\\n"\n', b'0:"a<b"\n', b'0:"</think>"\n',
                                   b'0:"b"\n0:"c"\n', b'g:"b"\n', b"0:5\n", b'0:"b""\n', b"\n", STOP])
def test_the_short_way_leads_where_the_long_one_does(before, piece):
    def answer(short):
        dialect, pipeline = akashproxy.ChatCompletions(CHAT), akashproxy.DecoderChain(akashproxy.AkashDecoder(), akashproxy.SurrogateFilter(), ThinkTagFilter())
        dialect.id, dialect.created, taken = "x", 1, b""
        sent = dialect.opening_frames() + dialect.encode(pipeline.feed(before))
        for data in [piece, b'0:"</think> d"\n', STOP]:
            encoded = short and pipeline.fast_path(data)
            taken = encoded or taken
            sent += dialect.text_frame(encoded) if encoded else dialect.encode(pipeline.feed(data))
        return sent, pipeline.error and pipeline.error.message, taken

    (long, error, _), (short, its_error, taken) = answer(False), answer(True)
    assert (short, its_error) == (long, error)
    assert (taken == b'"b c"') == (piece == b'0:"b c"\n' and before.endswith((b'0:"a"\n', b'"`"\n')))


def test_legacy_completions(akash, serve):
    server = serve()
    body = {"model": "m", "prompt": "Once", "max_tokens": 50}
    got = ask(server, "POST", "/v1/completions", body)
    assert got.json["object"] == "text_completion" and got.json["id"].startswith("cmpl-")
    assert got.json["choices"] == [{"text": "Hello from the mock.", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert akash.bodies()[0]["messages"] == [user("Once")]
    got = ask(server, "POST", "/v1/completions", {**body, "stream": True, "echo": True, "prompt": ["Once"]})
    events = sse(got.body)
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello from the mock." and "echo" in got.headers["x-akashproxy-ignored"]
    assert events[-1]["choices"][0]["finish_reason"] == "stop" and {event["object"] for event in events} == {"text_completion"}
    for prompt in (None, "", [], ["a", "b"], [1, 2], 7):
        assert ask(server, "POST", "/v1/completions", {**body, "prompt": prompt}).json["error"]["param"] == "prompt"
    for field in ({"suffix": "x"}, {"best_of": 2}, {"logprobs": 1}, {"n": 3}):
        assert ask(server, "POST", "/v1/completions", {**body, **field}).json["error"]["param"] == list(field)[0]


# == server ===================================================================================


@table({
    # name: (path, body, param, words)
    "no JSON": ("chat/completions", b"{", None, "not valid JSON"),
    "nothing": ("chat/completions", b"", None, "not valid JSON"),
    "bad UTF-8": ("chat/completions", b'{"model":"\xff"}', None, "not valid JSON"),
    "another encoding": ("chat/completions", '{"model":"m"}'.encode("utf-16"), None, "not valid JSON"),
    "deep": ("chat/completions", b'{"model":' + b"[" * 100000, None, "not valid JSON"),
    "a list": ("chat/completions", b"[]", None, "must be a JSON object"),
    "no model": ("chat/completions", {"messages": [user("a")]}, "model", "'model' is missing"),
    "an empty model": ("chat/completions", {**CHAT, "model": ""}, "model", "must not be empty"),
    "a model that is a number": ("chat/completions", {**CHAT, "model": 7}, "model", "must be the name"),
    "no messages": ("chat/completions", {"model": "m"}, "messages", "'messages' is missing"),
    "empty messages": ("chat/completions", {"model": "m", "messages": []}, "messages", "must not be empty"),
    "messages that are text": ("chat/completions", {"model": "m", "messages": "hi"}, "messages", "must be a list"),
    "a message that is text": ("chat/completions", {"model": "m", "messages": ["hi"]}, "messages[0]", "must be an object"),
    "a message without a role": ("chat/completions", {"model": "m", "messages": [{"content": "x"}]}, "messages[0]", "'role'"),
    "stream": ("chat/completions", {**CHAT, "stream": "yes"}, "stream", "true or false"),
    "stream_options": ("chat/completions", {**CHAT, "stream_options": 7}, "stream_options", "must be an object"),
    "no prompt": ("images/generations", {}, "prompt", "'prompt' is missing"),
    "a prompt that is a list": ("images/generations", {"prompt": ["x"]}, "prompt", "must be a string"),
    "no pictures": ("images/generations", {"prompt": "x", "n": 0}, "n", "at least 1"),
    "eleven pictures": ("images/generations", {"prompt": "x", "n": 11}, "n", "at most 10"),
    "another form": ("images/generations", {"prompt": "x", "response_format": "gif"}, "response_format", "b64_json"),
    "streamed pictures": ("images/generations", {"prompt": "x", "stream": True}, "stream", "through chat"),
    "another model's pictures": ("images/generations", {"prompt": "x", "model": "dall-e-3"}, "model", "AkashGen"),
})
def test_bad_bodies_leave_the_connection_usable(path, body, param, words, akash, serve):
    with link_to(serve()) as link:
        got = ask_again(link, "POST", "/v1/" + path, body)
        assert (got.status, got.json["error"]["param"]) == (400, param), got.body
        assert words in got.json["error"]["message"]
        assert list(got.json["error"]) == ["message", "type", "param", "code"] and got.json["code"] == 400
        assert ask_again(link, "GET", "/health").status == 200
    assert not akash.bodies()


def test_the_ends_of_bodies(serve):
    server = serve(max_body=100)
    large = talk(server, post("/v1/chat/completions", b"x" * 101))
    assert large.startswith(b"HTTP/1.1 413 ") and b"larger than 100 bytes" in large and b"Connection: close" in large
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert talk(server, chunked + chunk(b"x" * 90) * 2).startswith(b"HTTP/1.1 413 ")
    slow = talk(serve(body_timeout=0.1), post("/v1/chat/completions", b"x" * 50)[:-1])
    assert slow.startswith(b"HTTP/1.1 408 ") and b"took too long" in slow
    cut = talk(server, post("/v1/chat/completions", b"x" * 50)[:-1], half_close=True)
    assert cut.startswith(b"HTTP/1.1 400 ") and b"ended within a body" in cut


def test_a_body_may_be_announced(serve):
    data = json.dumps(CHAT).encode()
    with connect(serve(), head_of("POST", "/v1/chat/completions", "Expect: 100-continue", f"Content-Length: {len(data)}")) as sock:
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(data)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path, count", [("/health", 1), ("/health", 20), ("/", 1), ("/status", 3), ("/metrics", 1)])
def test_a_client_that_has_ended_its_side_gets_what_is_made_here(path, count, serve):
    server = serve()
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    for _ in range(20):     # it depends on who is faster
        assert talk(server, request * count, half_close=True).count(b"HTTP/1.1 200 ") == count
    assert talk(server, b"GET /health HTTP/1.0\r\n\r\n", half_close=True).startswith(b"HTTP/1.1 200 ")


def test_keep_alive_and_pipelines(serve):
    server = serve()
    two = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert talk(server, two).count(b"HTTP/1.1 200 OK") == 3
    assert talk(server, b"GET /health HTTP/1.0\r\n\r\n").count(b"Connection: close") == 1
    got = talk(server, b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /health HTTP/1.0\r\n\r\n")
    assert got.count(b"200 OK") == 2 and got.count(b"Connection: keep-alive") == 1
    old = talk(server, post("/v1/chat/completions", {**CHAT, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"Transfer-Encoding" not in old and old.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("route, status", {
    ("GET", "/health"): 200, ("HEAD", "/health"): 200, ("GET", "/status"): 200, ("GET", "/health?a=b"): 200,
    ("GET", "/heal%74h"): 200, ("GET", "/heal%2574h"): 404, ("GET", "/"): 200, ("HEAD", "/"): 200, ("POST", "/"): 405, ("GET", "/v1"): 404, ("GET", "/v1/models/"): 200,
    ("GET", "/v1/chat/completions"): 405, ("DELETE", "/v1/models"): 405, ("POST", "/health"): 405, ("PUT", "/v1/completions"): 405,
    ("HEAD", "/v1/models"): 200, ("BREW", "/health"): 405, ("GET", "/images/"): 404, ("GET", "/../etc/passwd"): 404,
}.items())
def test_routes(route, status, serve):
    method, path = route
    got = ask(serve(), method, path)
    assert got.status == status
    if method == "HEAD":
        assert got.body == b"" and int(got.headers["content-length"]) > 0
    elif got.status == 405:
        assert got.headers["allow"] == ("POST, OPTIONS" if "completions" in path else "GET, HEAD, OPTIONS")
    if got.status >= 400:
        assert got.json["error"]["message"]


SLASHES = {"/health/": 200, "/v1/models/": 200, "/v1/models/Qwen/Qwen3/": 200, "/status/": 200, "/metrics/": 200, "/": 200,
           "/health//": 404, "//": 404, "/nothing/": 404}


def test_a_path_prefix_and_a_slash_at_the_end_of_a_path(akash, serve):
    server, locked = serve(path_prefix="/my/secret/"), serve(bearer_token=("t",))
    assert server.url.endswith("/my/secret") and {path: ask(server, path="/my/secret" + path).status for path in SLASHES} == SLASHES
    for path in ("/v1/models", "/", "/health", "/my/secret", "/my/secretv1/models", "/my", "/MY/secret/v1/models", "/my/secret/my/secret/v1/models"):
        assert ask(server, path=path).status == 404, path
    for path, status in (("/my/secret/v1/chat/completions", 200), ("/my/secret/v1/chat/completions/", 200), ("/v1/chat/completions", 404)):
        assert ask(server, "POST", path, CHAT).status == status
    link = image_link(akash, server, "/my/secret/v1/images/generations")
    assert link.startswith(server.url + "/images/") and ask(server, path=link.partition(str(server.server_port))[2]).status == 200
    assert [ask(locked, path=path).status for path in ("/v1/models/", "/status/", "/health/")] == [401, 401, 200]


def test_health_and_status(serve):
    server = serve()
    assert ask(server).json == {"status": "ok", "message": "akashproxy is running"}
    status = ask(server, path="/status").json
    assert status["status"] == "ok" and status["controllers"][0]["name"] == "akash" and status["version"]


def test_browsers_may_come_from_anywhere(serve):
    server = serve(cors_origins=("*",))
    got = ask(server, "OPTIONS", "/v1/chat/completions", headers={
        "Origin": "https://a.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os,b@d"})
    assert (got.status, got.body, got.headers["access-control-allow-origin"]) == (204, b"", "*")
    assert got.headers["access-control-allow-headers"] == "authorization, x-stainless-os" and "content-length" not in got.headers
    assert got.headers["access-control-allow-methods"] == got.headers["allow"] == "POST, OPTIONS"
    for status, answer in ((404, ask(server, path="/nowhere")), (400, chat(server, model="")), (200, chat(server, stream=True))):
        assert answer.status == status and answer.headers["access-control-allow-origin"] == "*"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("text, origin", [
    ("https://A.example/", "https://a.example"), ("http://a.example:8080", "http://a.example:8080"), ("*", "*"), ("null", "null"), ("file://", "file://"),
    ("app://obsidian.md", "app://obsidian.md"), ("chrome-extension://abc/", "chrome-extension://abc"),
    ("a.example", None), ("https://a.example/app", None), ("https://a.example https://b.example", None), ("", None), ("*.example", None)])
def test_origins_are_written_as_browsers_send_them(text, origin):
    if origin:
        assert Settings(cors_origins=(text,)).cors_origins == (origin,)
    else:
        with pytest.raises(ConfigError, match="is not an origin such as https://example.com"):
            Settings(cors_origins=(text,))


def test_request_ids(serve):
    server = serve()
    assert ask(server, headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 129, "é", "<x>"):
        assert ask(server, headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"].startswith("req_")
    assert chat(server, model="").headers["x-request-id"] != chat(server, model="").headers["x-request-id"]


@pytest.mark.parametrize("then", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["", "it asks again"])
@pytest.mark.parametrize("first", [None, b'0:"one "\n'], ids=["at once", "within"])
def test_a_client_that_leaves_ends_the_upstream_request(first, then, streamed, akash, serve):
    server, before = serve(), akashproxy.CancelScope.active.copy()
    akash.faults.append(akash.stall(first))
    with connect(server, post("/v1/chat/completions", {**CHAT, "stream": streamed})) as sock:
        wait_for(akash.bodies)
        sock.sendall(then)
        time.sleep(0.1 * bool(then))    # for some looks of the watchdog
    wait_for(akash.gone.is_set)
    wait_for(lambda: not server.connections and not akashproxy.CancelScope.active - before)


@pytest.mark.parametrize("said", [[Text("HI")], []])
def test_a_controller_that_forgets_to_finish(said, own, serve):
    own(type("Forgets", (akashproxy.Controller,), {"events": lambda self, call: iter(said)}))
    server = serve(controllers=(OF_ONES_OWN,))
    got = chat(server)
    assert got.status == 502 and EARLY in got.json["error"]["message"]
    if said:
        assert EARLY in stream(server)[3]["message"]


def test_the_address_in_links_without_a_host(akash, serve):
    akash.chat = PICTURE_LINE
    server = serve()
    got = talk(server, post("/v1/images/generations", {"prompt": "x"}).replace(b"HTTP/1.1\r\nHost: x", b"HTTP/1.0"))
    assert f'"url":"{server.url}/images/'.encode() in got


def test_a_stop_leaves_no_thread_and_needs_no_start(serve):
    clients = lambda: sum(thread.name == "akashproxy client" for thread in threading.enumerate())
    before = clients()
    for _ in range(10):
        server = Server(Settings(server_address="127.0.0.1:0")).start()
        assert {got.status for got in at_once(lambda: ask(server), 4)} == {200}
        server.stop(1)
    wait_for(lambda: clients() <= before)
    Server(Settings(server_address="127.0.0.1:0")).stop()


def test_several_stops_may_come_at_once():
    for _ in range(20):
        server = Server(Settings(server_address="127.0.0.1:0")).start()
        at_once(lambda: server.stop(0), 8, 8)
        server.loop.join(10)
        server.stop(0)
        assert server.socket.fileno() < 0 and not server.loop.is_alive()


def test_no_stop_ends_the_loop_before_the_backlog_is_accepted():
    server, gate = Server(Settings(server_address="127.0.0.1:0")).start(), threading.Event()
    server.loop.call_soon_threadsafe(lambda: gate.wait(10))         # it is slow
    stops = [later(server.stop, 0) for _ in range(2)]
    assert not concurrent.futures.wait(stops, 0.1).done
    gate.set()
    assert [stop.result() for stop in stops] == [None, None] and server.socket.fileno() < 0


def test_only_what_is_short_is_remembered():
    head = b"GET /%b HTTP/1.1\r\nX-Long: %b" % (b"a" * 5000, b"b" * 5000)
    for parse in (akashproxy.parse_field, akashproxy.parse_request_line):
        parse.cache_clear()
    assert akashproxy.parse_head(head, akashproxy.parse_request_line)[1] == {"x-long": "b" * 5000}
    assert BodyDecoder(CHUNKED).feed(b"0\r\nX-Trailer: " + b"c" * 5000 + b"\r\n\r\n") == b""
    assert [parse.cache_info().currsize for parse in (akashproxy.parse_field, akashproxy.parse_request_line)] == [0, 0]


def test_a_bug_is_not_shown_and_ends_its_call(own, serve, caplog):
    own(type("Buggy", (akashproxy.ChatCompletions,), {"response_body": lambda self, answer: 1 / 0}), "/v1/buggy")
    server = serve(controllers=(ECHO,), keys=keys("alice"))
    got = ask(server, "POST", "/v1/buggy", CHAT, bearer("alice"))
    assert (got.status, got.headers["x-should-retry"]) == (500, "false") and counts(server) == (0, 1, 0)
    assert "division" not in got.body.decode() and "ZeroDivisionError" in caplog.text


def test_a_graceful_stop(akash, serve, monkeypatch):
    monkeypatch.setattr(akashproxy, "LAME_DUCK_SECONDS", 0.1)
    server, hold = serve(), threading.Event()
    akash.faults.append(akash.steps(STREAM_HEAD + chunk(b'0:"one "\n'), hold, chunks(b'0:"two"\n' + STOP)))
    with link_to(server) as idle:
        assert ask_again(idle).status == 200
        answer = later(stream, server)
        wait_for(lambda: akash.bodies())
        stopped = later(server.stop, 10)
        wait_for(lambda: server.draining and server.socket.fileno() < 0)
        assert idle.sock.recv(1) == b"", "an idle connection is closed soon"
        hold.set()
        assert answer.result() == ("one two", "", "stop", None)
        stopped.result()


# == the command ==============================================================================


BUILD = tempfile.TemporaryDirectory(prefix="akashproxy-")


@functools.lru_cache(maxsize=None)
def compiled():
    """The module as the image has it. As a script it would be compiled by each process again, which takes most of its time to start."""
    return py_compile.compile(str(HERE / "akashproxy.py"), str(pathlib.Path(BUILD.name) / "akashproxy.pyc"), "akashproxy.py", doraise=True)


def command(*flags, **environ):
    clean = {name: value for name, value in os.environ.items() if name.upper() not in SETTINGS}
    return dict(args=[sys.executable, "-I", compiled(), *flags], env={**clean, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SETTINGS = {name.upper(): item for name, item in akashproxy.setting_fields(Settings).items()}


def run(*flags, **environ):
    """Run the command to its end; in this process, which is faster, if it only looks at its settings or asks upstreams."""
    if not {"--check", "--health"} & set(flags):
        return subprocess.run(**command(*flags, **environ), timeout=30)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setattr(os, "environ", command(*flags, **environ)["env"])
        return subprocess.CompletedProcess(flags, akashproxy.main(list(flags)), out.getvalue(), errors.getvalue())


@contextlib.contextmanager
def spawned(*flags, before="", popen=(), **environ):
    """The command as a process. ``before`` is Python that it runs first, with the module imported; ``popen`` are further options."""
    arguments = {**command(*flags, **environ), **dict(popen)}
    if before:
        code = f"import sys; sys.path.insert(0, {BUILD.name!r}); import akashproxy; {before}; sys.exit(akashproxy.main())"
        arguments["args"][1:3] = ["-c", code]
    process = subprocess.Popen(**arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def port_of(process):
    line = process.stdout.readline()
    match = re.search(r" on http://127\.0\.0\.1:(\d+)\S*/v1", line)
    assert match, line + process.stderr.read()
    return int(match[1])


@contextlib.contextmanager
def started(*flags, **options):
    """The command as a process: (process, its port)."""
    with spawned("--server-address", "127.0.0.1:0", *flags, **options) as process:
        yield process, port_of(process)


def test_the_demo_goes_the_whole_way(demo):
    assert [model["id"] for model in ask(demo, path="/v1/models").json["data"]] == ["demo", "AkashGen"]
    asked = {"model": "demo", "messages": [user("What is Akash?")]}
    complete = later(chat, demo, asked)
    text, _, finish, _ = stream(demo, asked)
    assert "What is Akash?" in text and finish == "stop"
    assert "What is Akash?" in text_of(complete.result())
    text, thought, _, _ = stream(demo, {"model": "AkashGen", "messages": [user("It's a \"fox\"")]})
    assert "2 before it" in thought and "It's a \"fox\"" in text
    for streamed in (False, True):
        got = chat(demo, {"model": "gpt-4o", "messages": [user("hi")]}, stream=streamed)
        assert got.status == 500 and got.json["code"] == 500 and b"model_not_found" in got.body
    picture = ask(demo, path="/images/" + re.search(r"/images/([^)]+)\)", text)[1])
    assert picture.headers["content-type"] == "image/png" and picture.body.startswith(b"\x89PNG\r\n\x1a\n")
    health = run("--health", SERVER_ADDRESS=f"127.0.0.1:{demo}")
    assert health.returncode == 0 and "running" in health.stdout


def test_an_address_that_can_not_be_listened_on_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address, words in ((f"127.0.0.1:{taken.getsockname()[1]}", r"127\.0\.0\.1:\d+: Address already in use"),
                               ("no-such-host.invalid:1", "no-such-host.invalid: no such host")):
            done = run(SERVER_ADDRESS=address)
            assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(f"akashproxy: cannot listen on {words}\n", done.stderr)


@pytest.mark.parametrize("flags, words", [
    (["--server-address", "abc"], "--server-address: 'abc' has no port"),
    ([], "AKASH_BASE_URL: 'x' is not an http:// or https:// URL"),
    (["--nonsense"], "unknown flag --nonsense; --help lists the flags"),
    (["--confg-file", "x"], "unknown flag --confg-file; did you mean '--config-file'?"),
    (["--sever-address=:1"], "unknown flag --sever-address; did you mean '--server-address'?"),
    (["-config_fle=x"], "unknown flag --config-fle; did you mean '--config-file'?"),
    (["serve"], "unknown argument serve; --help lists the flags"),
    (["--config-file"], "argument --config-file: expected one argument"),
])
def test_a_mistake_in_flags_or_variables_is_one_clear_line(flags, words, monkeypatch, capsys):
    if not flags:
        monkeypatch.setenv("AKASH_BASE_URL", "x")
    assert akashproxy.main(flags) == 2
    assert capsys.readouterr() == ("", f"akashproxy: {words}\n")


@pytest.mark.parametrize("flags", [["-config_file", "FILE"], ["-config_file=FILE"], ["--config_file", "FILE"], ["-config-file", "FILE"],
                                   ["-config_path", "DIR"], ["-config_path=DIR"]])
def test_flags_as_in_go(flags, config, tmp_path, capsys):
    path = config({"max_wait": 7})
    assert akashproxy.main([*[flag.replace("FILE", path).replace("DIR", str(tmp_path)) for flag in flags], "-check"]) == 0
    assert "MAX_WAIT=7" in capsys.readouterr().out


def hung_pipe():
    """Both ends of a pipe that is full, so that writing to it blocks."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 65536)
    os.set_blocking(writer, True)
    return reader, writer


def test_a_log_that_nobody_reads_costs_lines_only(akash):
    reader, writer = hung_pipe()
    with started(AKASH_BASE_URL=akash.url, before="akashproxy.LogWriter.SIZE = 20", popen={"stderr": writer}) as (process, server):
        os.close(writer)
        for _ in range(50):
            assert ask(server, path="/nowhere").status == 404
        output = b""
        while b" log lines were lost\n" not in output:
            output += os.read(reader, 65536)
        assert ask(server, path="/nowhere").status == 404
        process.send_signal(signal.SIGTERM)
        output += b"".join(iter(lambda: os.read(reader, 65536), b""))
        assert process.wait(20) == 0
        lost = sum(map(int, re.findall(rb"WARNING (\d+) log lines were lost\n", output)))
        assert lost > 5 and output.count(b" status=404 ") + lost == 51
    os.close(reader)


def test_sigterm_works_while_nobody_reads_the_log(akash):
    reader, writer = hung_pipe()
    with started(AKASH_BASE_URL=akash.url, before="akashproxy.LogWriter.FLUSH_TIMEOUT = 0.1", popen={"stderr": writer}) as (process, server):
        for _ in range(20):
            assert ask(server, path="/nowhere").status == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    os.close(reader), os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_cleanly_and_writes_the_last_lines_of_its_log(number):
    with started("--demo") as (process, server):
        for _ in range(20):
            ask(server, path="/nowhere")
        process.send_signal(number)
        assert process.wait(20) == 0
        output = process.stderr.read()
        assert output.count(" status=404 ") == 20 and "Traceback" not in output


full_disk = functools.partial(os.open, "/dev/full", os.O_WRONLY)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("flags, status, output", [
    (["--check"], 0, full_disk), (["--help"], None, closed_pipe), (["--nonsense"], 2, full_disk), ([], 0, full_disk), ([], 0, closed_pipe)])
def test_output_that_can_not_be_written_is_no_traceback(flags, status, output, name, akash):
    port, closed = free_port(), output()
    with spawned("--server-address", f"127.0.0.1:{port}", "--akash-base-url", akash.url, *flags, popen={name: closed}) as process:
        os.close(closed)
        if not flags:
            wait_for(lambda: not refused(port) or process.poll() is not None)
            assert ask(port).status == 200
            process.send_signal(signal.SIGTERM)
        printed = "".join(filter(None, process.communicate(timeout=20)))
    assert "Traceback" not in printed and "Exception" not in printed
    assert process.returncode in ((0, 1) if status is None else (status,))


@pytest.mark.parametrize("number, ends", [(signal.SIGHUP, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_while_it_starts_is_heeded(number, ends, tmp_path):
    fifo = tmp_path / "akashproxy.json"     # the command waits for its configuration until somebody writes it
    os.mkfifo(fifo)
    with spawned("--server-address", "127.0.0.1:0", "--config-file", str(fifo)) as process:
        with open(fifo, "w") as file:
            process.send_signal(number)
            file.write('{"controllers": [{"type": "echo"}]}')
        os.unlink(fifo)
        fifo.write_text('{"controllers": [{"type": "echo"}]}')
        assert " serves " in process.stdout.readline()
        if not ends:
            assert "were reloaded" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()


def test_a_second_signal_stops_at_once(akash):
    akash.faults.append(akash.stall(b'0:"one "\n'))
    with started(AKASH_BASE_URL=akash.url, GRACE="60") as (process, port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(post("/v1/chat/completions", {**CHAT, "stream": True}))
            sock.recv(100)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refused(port))
            assert process.poll() is None, "it waits for the stream"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert "stopping: 1 running requests have 60 seconds to end" in process.stderr.read()


@pytest.mark.parametrize("address, token, with_keys, warned", [
    ("0.0.0.0:0", "", False, True), ("0.0.0.0:0", "t", False, False), ("127.0.0.1:0", "", False, False), ("0.0.0.0:0", "", True, False)])
def test_an_open_address_is_warned_of(address, token, with_keys, warned, config):
    file = config({"keys": [{"name": "alice", "key": "k"}]}) if with_keys else ""
    with spawned("--server-address", address, BEARER_TOKEN=token, CONFIG_FILE=file) as process:
        process.stdout.readline()
        process.terminate()
        assert ("set BEARER_TOKEN" in process.communicate(timeout=20)[1]) == warned


@pytest.mark.parametrize("python", ["3.7", "3.8"])
def test_an_old_python_says_what_is_needed(python):
    root = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    found = [*pathlib.Path("/usr/bin").glob(f"python{python}"), *root.glob(f"versions/{python}.*/bin/python")]
    if not found:
        pytest.skip(f"Python {python} is not installed")
    done = subprocess.run([found[0], HERE / "akashproxy.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.decode().startswith("akashproxy needs Python 3.9 or newer, and this is 3.") and done.stderr.count(b"\n") == 1


def test_the_file_is_a_script_for_uv_and_pipx():
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SOURCE)    # as PEP 723 has it
    assert block["content"] == '# requires-python = ">=3.9"\n# dependencies = []\n' and os.access(HERE / "akashproxy.py", os.X_OK)


@pytest.mark.parametrize("cls", [Settings, akashproxy.ControllerSettings, akashproxy.ClientKeySettings])
def test_settings_describe_themselves_and_take_lists(cls):
    for item in akashproxy.setting_fields(cls).values():
        assert f"    {item.name}: {item.metadata['help']}" in cls.__doc__
        if item.type.startswith("Tuple[str"):
            value = {"bearer_token": ["tok"], "trusted_proxies": ["127.0.0.1/32"]}.get(item.name, ["a", "b"])
            required = {"name": "a", "key": "b"} if cls is akashproxy.ClientKeySettings else {}
            with contextlib.suppress(ConfigError):
                assert getattr(cls(**{**required, item.name: value}), item.name) == tuple(value), item.name


def test_where_others_reach_a_server_that_listens_everywhere():
    with spawned("--server-address", "0.0.0.0:0", "--demo") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        port = re.search(r", simulated without a network, on http://127\.0\.0\.1:(\d+)/v1\n", lines[0])[1]
        assert lines[1:] == [f"it listens on all addresses of this machine, port {port}\n", f"page to chat with: http://127.0.0.1:{port}/   stop: Ctrl-C\n"]
        process.terminate()
        warning = process.communicate(timeout=20)[1]
    assert re.search(rf"anyone who can reach (http://\S+:{port}|port {port} of this machine)", warning) and "http://127.0.0.1" not in warning


def test_help_and_version():
    done = run("--help")
    assert done.returncode == 0
    for item in SETTINGS.values():
        assert akashproxy.flag_name(item) in done.stdout
    for program in (compiled(), HERE / "akashproxy.py"):
        done = subprocess.run([sys.executable, "-I", program, "--version"], stdout=subprocess.PIPE, text=True, timeout=30)
        assert done.stdout == f"akashproxy {akashproxy.__version__}\n"


def test_health_asks_the_server():
    done = run("--health", SERVER_ADDRESS=f":{free_port()}")
    assert done.returncode == 1 and "no answer" in done.stderr
    with started("--demo", "--path-prefix", "/s") as (_, port):
        assert run("--health", "--server-address", f"127.0.0.1:{port}", "--path-prefix", "/s").returncode == 0


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("address", ["[::]:0", ":0"])
def test_all_interfaces_take_both_families(address, serve):
    server = serve(server_address=address)
    for host in ("127.0.0.1", "::1"):
        socket.create_connection((host, server.server_port), timeout=5).close()


def test_importing_starts_nothing():
    done = subprocess.run([sys.executable, "-c", "import threading, akashproxy; print(threading.active_count())"],
                          cwd=HERE, capture_output=True, text=True, timeout=30)
    assert done.stdout == "1\n"


# == the configuration file ===================================================================


@pytest.fixture
def config(tmp_path):
    """config({...}) or config("text") writes a file; its path."""
    def write(data, name="akashproxy.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)
    return write


def load(path, **environ):
    return Settings.load(environ, {"config_file": path})


def test_the_originals_example_files_start_as_they_stand(config, tmp_path):
    config({"api_key": "", "proxy": ""}, "openai.json")
    first = {"port": "8080", "pool": {"type": "balanced"}, "controllers": [
        {"type": "openai", "weight": 5, "config": {"api_key": "k1"}}, {"type": "openai", "config_file": "openai.json"}]}
    settings = load(config(first), OPENAI_API_KEY="k2")
    assert (settings.server_address, settings.pool_type) == (":8080", "balanced")
    assert [(c.name, c.weight, c.api_key, c.base_url) for c in settings.pool()] == [
        ("openai", 5, "k1", "https://api.openai.com/v1"), ("openai-2", 1, "k2", "https://api.openai.com/v1")]
    (tmp_path / "config").mkdir()
    config({"api_key": "k3"}, "config/openai.json")
    second = {"port": "1234", "controllers": [{"type": "openai", "config": {"api_key": "k1"}},
                                              {"type": "openai", "config_file": "config/openai.json"}]}
    assert [c.api_key for c in load(config(second)).pool()] == ["k1", "k3"]


def test_a_config_file_is_found_beside_its_own_or_where_the_command_was_started(config, tmp_path, monkeypatch):
    config({"api_key": "beside"}, "config/openai.json")
    path = config({"controllers": [{"config_file": "config/openai.json"}]}, "config/config.json")
    monkeypatch.chdir(tmp_path)
    assert load(path).pool()[0].api_key == "beside"


def test_the_search_for_a_file(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Settings.load({}).config_file == ""
    for name in ("config/chatgpt-apiserver.json", ".config/chatgpt-apiserver.json", "chatgpt-apiserver.json", "akashproxy.json",
                 "else/where.json", "else/akashproxy.json"):
        config({"max_wait": 7, "controllers": [{"type": "echo"}]}, name)
    found = [str(Settings.load(environ).config_file) for environ in (
        {"CONFIG_FILE": "else/where.json"}, {"CHATGPT_APISERVER_CONFIG_FILE": "else/where.json"}, {"CONFIG_PATH": "else"},
        {"CHATGPT_APISERVER_CONFIG_PATH": "else"}, {})]
    assert found == ["else/where.json", "else/where.json", "else/akashproxy.json", "else/akashproxy.json", "./akashproxy.json"]
    (tmp_path / "akashproxy.json").unlink()
    (tmp_path / "chatgpt-apiserver.json").rename("chatgpt-apiserver.yaml")      # what can be read is preferred
    assert Settings.load({}).config_file == ".config/chatgpt-apiserver.json"
    for flag in ("--config_file", "--config-file"):
        assert "MAX_WAIT=7" in run(flag, str(tmp_path / "else/where.json"), "--check").stdout


@pytest.mark.parametrize("files, environ, words", [
    ({}, {"CONFIG_PATH": "else"}, "there is no akashproxy.json or chatgpt-apiserver.json in else"),
    ({"else/other.json": "{}", "akashproxy.json": "{}"}, {"CONFIG_PATH": "else"}, "there is no akashproxy.json"),
    ({"else/chatgpt-apiserver.yaml": "port: 1"}, {"CHATGPT_APISERVER_CONFIG_PATH": "else"}, "else/chatgpt-apiserver.yaml: only JSON"),
    ({}, {"CONFIG_FILE": "none.json"}, "none.json: No such file"), ({"d/x": ""}, {"CONFIG_FILE": "d"}, "d: Is a directory"),
    ({"c.yaml": "port: 1"}, {"CONFIG_FILE": "c.yaml"}, "c.yaml: only JSON is supported"),
    *[({name: "x"}, {}, f"{name}: only JSON is supported") for name in (
        "chatgpt-apiserver.yaml", "config/chatgpt-apiserver.yml", "chatgpt-apiserver.toml", ".config/akashproxy.yaml", "akashproxy.ini")],
    ({"a.json": '{"controllers": [{"config_file": "o.yaml"}]}', "o.yaml": "api_key: x"}, {"CONFIG_FILE": "a.json"}, "o.yaml: only JSON is supported"),
    ({"config/akashproxy.json": os.mkdir}, {}, "config/akashproxy.json: Is a directory"),
    ({"config/akashproxy.json": functools.partial(os.symlink, "nowhere")}, {}, "config/akashproxy.json: No such file"),
])
def test_a_configuration_that_can_not_be_used_is_a_mistake(files, environ, words, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("config")
    for name, content in files.items():
        content(name) if callable(content) else config(content, name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert akashproxy.main([]) == 2
    output = capsys.readouterr()
    assert not output.out and words in output.err and output.err.count("\n") == 1


@pytest.mark.parametrize("base_url, sent", [
    (None, True), ("https://api.openai.com/v1", True), ("https://API.openai.com", True), ("https://eu.api.openai.com/v1", True), ("http://h:1", False),
    ("https://api.openai.com.evil.example/v1", False), ("https://evilapi.openai.com.example", False), ("https://openai.com", False),
])
def test_the_key_for_openai_goes_to_openai_only(base_url, sent, config, monkeypatch, capsys):
    controller = {"base_url": base_url} if base_url else {}
    path = config({"controllers": [{**controller, "api_key": ""} if sent else controller]})
    options = load(path, OPENAI_API_KEY="s3cret").pool()[0]
    assert (options.api_key == "s3cret") == sent
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    assert akashproxy.main(["--check", "--config-file", path]) == 0
    displayed = capsys.readouterr().out
    assert ("api_key=******** (OPENAI_API_KEY)\n" in displayed) == sent and "s3cret" not in displayed


@pytest.mark.parametrize("named", [True, False])
def test_akashs_secrets_go_to_akashs_own_server_only(named, akash, serve):
    other = FakeAkash()
    settings = {"akash_access_token": "s3cret", "akash_cookie": "c=s3cret", "controllers": (
        akashproxy.ControllerSettings(type="akash", base_url=akash.url + "/p" if named else ""),
        akashproxy.ControllerSettings(type="akash", base_url=other.url, priority=2))}
    akash.session = other.session = reply(404)
    akash.faults.append(akash.refuse())
    server = serve(**settings)
    ask(server, path="/v1/models"), chat(server)
    assert akash.requests and other.requests
    assert all("s3cret" in str(request.headers) for request in akash.requests)
    assert not any("s3cret" in str(request) for request in other.requests)


def test_check_says_where_a_key_comes_from(config):
    config({"api_key": "k"}, "more.json")
    path = config({"controllers": [{"api_key": "${MINE}"}, {"config_file": "more.json"}, {"config": {"api_key": "k"}}, {}, {"type": "akash"},
                                   {"base_url": "http://h:1"}]})
    displayed = run("--check", "--config-file", path, MINE="k", OPENAI_API_KEY="k", AKASH_ACCESS_TOKEN="k").stdout
    assert re.findall(r"api_key=\*{8} \((.*)\)", displayed) == [path, "more.json", path, "OPENAI_API_KEY", "AKASH_ACCESS_TOKEN"]


def test_no_key_can_be_said_and_an_empty_config_file_is_none(config):
    path = config({"controllers": [{"base_url": "http://h:1", "api_key": ""}, {"base_url": "http://h:2", "config": None},
                                   {"config_file": "", "config": {"api_key": "k"}}]})
    assert [c.api_key for c in load(path).pool()] == ["", "", "k"]


def test_a_bad_key_of_the_environment_is_one_mistake_of_several(config):
    error = error_of(ConfigError, load, config({"max_wait": "x", "controllers": [{"type": "openai"}]}), OPENAI_API_KEY="\u00e9")
    assert len(error.problems) == 2
    assert "OPENAI_API_KEY: only printable ASCII" in str(error) and "max_wait" in str(error)


def test_all_mistakes_are_named_at_once_with_their_sources():
    environ = {"UPSTREAM": "openai", "OPENAI_API_KEY": "a\nb", "OPENAI_BASE_URL": "x", "PORT": "x", "MAX_WAIT": "x"}
    error = error_of(ConfigError, Settings.load, environ, {"max_body": "y"})
    assert [problem.partition(":")[0] for problem in error.problems] == ["MAX_WAIT", "--max-body", "OPENAI_BASE_URL", "OPENAI_API_KEY", "PORT"]


def test_what_wins_over_what(config):
    path = config({"port": 8080, "max_wait": 1, "pool": {"type": "random"}, "idle_timeout": 2.5, "bearer_token": ["a", "b"]})
    settings = Settings.load({"MAX_WAIT": "5", "CHATGPT_APISERVER_POOL_TYPE": "balanced", "CHATGPT_APISERVER_PORT": "81",
                              "AKASH_BASE_URL": "http://h:1/p/", "BODY_TIMEOUT": "1.5", "USER_AGENT": "", "HOME": "/"}, {"config_file": path, "max_wait": "6"})
    assert (settings.akash_base_url, settings.body_timeout, settings.user_agent) == ("http://h:1/p", 1.5, f"akashproxy/{akashproxy.__version__}")
    assert (settings.server_address, settings.pool_type, settings.max_wait, settings.idle_timeout, settings.bearer_token) == (
        ":81", "balanced", 6.0, 2.5, ("a", "b"))
    assert Settings.load({"SERVER_ADDRESS": "localhost:1", "CHATGPT_APISERVER_PORT": "81"}, {"config_file": path}).server_address == "localhost:1"
    assert load(config({"port": 1, "server_address": "h:2"})).server_address == "h:2"


def test_the_environment_within_the_file(config):
    path = config({"bearer_token": "${A}", "controllers": [{"api_key": "x-${A}", "headers": {"x": "${B}"}, "base_url": "http://h:1"}]})
    settings = load(path, A="1", B="2")
    assert settings.bearer_token == ("1",) and settings.pool()[0].api_key == "x-1" and settings.pool()[0].headers == {"x": "2"}
    assert [problem.split(": ", 1)[1] for problem in error_of(ConfigError, load, path, A="").problems] == [
        "bearer_token: the environment variable A is not set", "controllers[0].api_key: the environment variable A is not set",
        "controllers[0].headers.x: the environment variable B is not set"]


def test_all_mistakes_of_a_file_with_their_places(config):
    path = config({"prot": 1, "max_wait": "long", "pool": {"type": "balancd", "x": 1}, "cors_origins": 7, "controllers": [
        {"type": "openia", "api_key": "k"}, {"weight": -1, "wieght": 2, "api_key": "k"}, 7, {"config": 7},
        {"api_key": "k", "base_url": "x", "proxy": "ftp://x", "models": [1], "model_map": [], "name": "a b", "weight": True,
         "headers": {"a": "b\n"}, "max_concurrency": 1.5}, {}, {"config_file": "missing.json"},
        {"name": "a", "type": "echo"}, {"name": "a", "type": "echo"}]})
    problems = "\n".join(problem[len(path) + 2:] for problem in error_of(ConfigError, load, path).problems)
    for line in ("prot: unknown key; did you mean 'port'?", "max_wait: must be a number", "pool.type: 'balancd' is not one of",
                 "pool.x: unknown key", "cors_origins: must be a list", "controllers[0].type: 'openia' is not one of akash, echo, openai",
                 "controllers[1].weight: must be a number, not negative", "controllers[1].wieght: unknown key; did you mean 'weight'?",
                 "controllers[2]: must be an object", "controllers[3].config: must be an object",
                 "controllers[4].base_url: 'x' is not an http", "controllers[4].proxy: must be http://", "controllers[4].models: must be a list",
                 "controllers[4].model_map: must be an object", "controllers[4].name: only letters", "controllers[4].weight: must be a number",
                 "controllers[4].headers: only printable", "controllers[4].max_concurrency: must be a whole",
                 "controllers[5].api_key: is missing, and OPENAI_API_KEY is not set", "missing.json: No such file", "controllers: two have the name 'a'"):
        assert line in problems, line


KEYS = {    # client keys that can not be: what is said of them
    "an object": ({}, "keys: must be a list"), "null": (None, "keys: must be a list"), "a text": (["k"], "keys[0]: must be an object"),
    "misspelt within": ([{"name": "a", "key": "k", "request_per_minute": 1}],
                        "keys[0].request_per_minute: unknown key; did you mean 'requests_per_minute'?"),
    "no name": ([{"key": "k"}], "keys[0].name: is missing"), "no key": ([{"name": "a"}], "keys[0].key: is missing"),
    "an empty name": ([{"name": "", "key": "k"}], "keys[0].name: must not be empty"),
    "an empty key": ([{"name": "a", "key": ""}], "keys[0].key: must not be empty"),
    "a key that can't be sent": ([{"name": "a", "key": "k "}], "keys[0].key: only printable ASCII"),
    "a name that can't be shown": ([{"name": "a|b", "key": "k"}], "keys[0].name: only letters"),
    "two names": ([{"name": "a", "key": "k"}, {"name": "a", "key": "l"}], "keys: two have the name 'a'"),
    "two keys": ([{"name": "a", "key": "s3cret"}, {"name": "b", "key": "s3cret"}], "keys: two have the same key"),
    "a rate that is none": ([{"name": "a", "key": "k", "requests_per_minute": 0.5}], "keys[0].requests_per_minute: must be a whole"),
    "not in the environment": ([{"name": "a", "key": "${NONE}"}], "keys[0].key: the environment variable NONE is not set"),
}


@pytest.mark.parametrize("text, words", [
    *[(json.dumps({"keys": value}), words) for value, words in KEYS.values()], ('{"kes": []}', "kes: unknown key; did you mean 'keys'?"),
    ('{"a": 1,\n "b": }', "line 2, column 7"), ("[]", "must be a JSON object"), ('{"controllers": []}', "at least one controller"),
    ('{"controllers": 7}', "at least one controller"), ('{"max_wait": NaN}', "NaN is not JSON"), ('{"pool": 1}', "pool: must be an object"),
    ('{"port": "x"}', "port: 'x' is not a valid port"), ('{"controllers": null}', "at least one controller"),
    ('{"max_wait": 1' + "0" * 400 + "}", "max_wait: must be a number"), ('{"log_level": "${MY-KEY}"}', "the name of an environment variable"),
    ('{"controllers": [{"type": "echo", "weight": 0}]}', "all of them are off"),
    ('{"controllers": [{"api_key": "k", "proxy": "http://h:99999"}]}', "controllers[0].proxy"),
    ('{"controllers": [{"api_key": "k", "headers": {"Content-Length": "1"}}]}', "can't be set"), ('{"ca_file": "/"}', "ca_file: '/' can't be used"),
    ("\xff", "akashproxy.json"),
])
def test_broken_files_and_the_exit_status(config, text, words, capsys):
    path = config("")
    pathlib.Path(path).write_text(text, encoding="latin-1")
    assert akashproxy.main(["--config_file", path, "--check"]) == 2
    problems = capsys.readouterr().err
    assert words in problems and "s3cret" not in problems and problems.count("\n") == 1 + ("MY-KEY" in text)


def test_check_shows_the_settings_their_file_and_the_controllers_but_no_secret(config):
    path = config({"controllers": [{"type": "openai", "api_key": "s3cret", "proxy": "http://u:s3cret@h:1", "headers": {"k": "s3cret"}}]})
    done = run("--config-file", path, "--check", "--log-level", "debug", BEARER_TOKEN="s3cret", AKASH_COOKIE="s3cret")
    displayed = dict(line.split("=", 1) for line in done.stdout.partition("\n\n")[0].splitlines()[2:])
    assert set(displayed) == set(SETTINGS) and displayed["BEARER_TOKEN"] == "********" and displayed["LOG_LEVEL"] == "debug"
    assert f"# file: {path}\n" in done.stdout and "# searched: ., .config, config, /etc/akashproxy, /etc/chatgpt-apiserver" in done.stdout
    assert "[openai]\ntype=openai" in done.stdout and "api_key=********" in done.stdout
    assert done.returncode == 0 and "s3cret" not in done.stdout + done.stderr + repr(load(path))


# == controllers: OpenAI ======================================================================


def test_a_chat_is_relayed_as_it_is(fake, pool):
    server = pool((fake, {"api_key": "upstream-key", "headers": {"X-Org": "o"}}))
    body = b'{"model": "both", "messages": [{"role":"user","content":"hi"}], "logprobs": true, "big": 12345678901234567890.10, "n": 2}'
    got = ask(server, "POST", "/v1/chat/completions", body, {"Authorization": "Bearer client-key", "Content-Type": "application/json"})
    assert got.body == fake.completion() and got.headers["content-type"] == "application/json"
    request = fake.requests[-1]
    assert request.body == body and request.headers["authorization"] == "Bearer upstream-key" and request.headers["x-org"] == "o"
    assert route_of(got) == "a=200" and not any("client-key" in str(request) for request in fake.requests)


EVENTS, SPEECH = "text/event-stream", "/v1/audio/speech"
SAID_EVENTS = b"".join(FakeOpenAI.words("Hi there."))
OTHER_EVENTS = (b'data: {"choices":[{"text":"Once upon","index":0,"finish_reason":null}]}\n\n'
                b'data: {"choices":[{"text":"","index":0,"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')


@table({
    # name: (path, the type and the bytes that an upstream sends, the type that the client gets)
    "a stream": ("/v1/chat/completions", EVENTS, b": hello\r\n\r\n" + SAID_EVENTS.replace(b"\n", b"\r\n").replace(b'"created": 1', b'"odd":{}'), EVENTS),
    **{f"blanks before its data, {mark}": ("/v1/chat/completions", EVENTS, SAID_EVENTS.replace(b"data: {", mark), EVENTS)
       for mark in (b"data:   {", b"data:{", b"data:\t{")},
    "a stream of legacy completions": ("/v1/completions", EVENTS, OTHER_EVENTS, EVENTS),
    "a stream of images": ("/v1/images/generations", EVENTS, OTHER_EVENTS, EVENTS),
    **{f"text that begins like an event, {text}": ("/v1/audio/transcriptions", "text/plain", text, "text/plain")
       for text in (b"it is raining", b"data is here", b"event one", b": colon")},
    **{f"words that could break a head, {said!r}": (SPEECH, "audio/mp3; a=" + said, b"ID3", "audio/mp3; a=" + told)
       for said, told in (("\xe9\x85\tb", "???b"), ("\xe9", "?"), ("b\tb", "b?b"))},
    "a secret in a type": (SPEECH, "audio/mpeg; x=upstream-key", b"ID3", "audio/mpeg; x=***"),
})
def test_what_is_relayed_is_relayed_byte_for_byte(path, kind, data, told, fake, pool):
    fake.sends(reply(kind="TYPE").partition(b"Transfer-")[0].replace(b"TYPE", kind.encode("latin-1")) + b"Transfer-Encoding: chunked\r\n\r\n"
               + chunks(*split(data, 7)))
    got = ask(pool((fake, {"api_key": "upstream-key"})), "POST", path, {**BOTH, "prompt": "Once", "echo": True, "stream": kind == EVENTS})
    assert (got.status, got.body, got.headers["content-type"]) == (200, data, told)


def test_names_and_fields_that_change(fake, pool):
    got = ask(pool((fake, {"model_map": {"ours": "theirs"}, "drop": ["seed"]})), "POST", "/v1/chat/completions",
              b'{"model":"ours","messages":[{"role":"user","content":"x"}],"seed":7,"user":"u","model":"ours"}')
    assert json.loads(fake.requests[-1].body) == {"model": "theirs", "messages": [user("x")], "user": "u"}
    assert got.headers["x-akashproxy-ignored"] == "seed" and fake.requests[-1].body.count(b"model") == 1


def test_other_paths_are_relayed_unparsed(fake, pool):
    server = pool((fake, {"api_key": "k"}))
    got = ask(server, "POST", "/v1/embeddings", {"model": "both", "input": "x", "encoding_format": "base64"})
    assert got.body == fake.completion() and fake.bodies()[0]["input"] == "x"
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\0\xff\r\n--b--\r\n'
    got = ask(server, "POST", "/v1/audio/transcriptions", form, {"Content-Type": "multipart/form-data; boundary=b"})
    assert (got.status, got.body, got.headers["content-type"]) == (200, b"ID3" + form, "audio/mpeg")
    assert fake.requests[-1].headers["content-type"] == "multipart/form-data; boundary=b" and fake.requests[-1].body == form
    assert ask(server, "POST", "/v1/nothing", {"model": "both"}).status == 404
    for path in ("/v1/a/../b", "/v1//x", "/v1/%2e%2e/x", "/v1/a.b", "/v2/embeddings", "/v1/"):
        asked = len(fake.requests)
        assert ask(server, "POST", path, {}).status == 404 and len(fake.requests) == asked


def test_a_relayed_answer_that_breaks_off(fake, pool):
    server = pool(fake.sends(FakeOpenAI.head("audio/mpeg") + chunk(b"ID3")))
    with pytest.raises(http.client.IncompleteRead):
        ask(server, "POST", "/v1/audio/speech", {"model": "both", "input": "x"})


ERROR_EVENT = b'data: {"error":{"message":"boom","type":"server_error","code":null}}\n\n'

# What servers say of why an answer ended, and what it means; "": an error.
@pytest.mark.parametrize("meaning, reason", [(meaning, reason) for meaning, reasons in {
    "stop": "stop eos EOS_TOKEN end_turn STOP stop_sequence completed whatever harmony_end",
    "length": "length max_tokens MAX_TOKENS model_length max_output_tokens model_context_window_exceeded token_limit",
    "content_filter": "content_filter content-filter SAFETY sensitive refusal RECITATION PROHIBITED_CONTENT BLOCKLIST guardrail_intervened SPII MODEL_ARMOR content_flagged nsfw DANGEROUS_CONTENT harmful toxicity",
    "": "error network_error insufficient_system_resource abort cancelled MALFORMED_FUNCTION_CALL engine_overloaded timeout rate_limit_exceeded"
        " MISSING_THOUGHT_SIGNATURE TOO_MANY_TOOL_CALLS insufficient_quota deadline_exceeded out_of_memory"
        " oom OutOfCredits insufficient_balance server_busy load_shed internal worker_crashed client_disconnected",
}.items() for reason in reasons.split()])
def test_why_an_answer_ended(meaning, reason):
    decoder = akashproxy.ChatDecoder("b")
    events = decoder.feed(FakeOpenAI.event({"content": "a"}, reason)) + decoder.close()
    assert events == ([T("a"), Finish(meaning)] if meaning else [T("a")])
    assert meaning or decoder.error.status == 502 and repr(reason) in decoder.error.message


def calls(*fragments):
    """A delta with fragments of tool calls (index, id, name, arguments), None for what is left out."""
    def fragment(index, id, name, arguments):
        function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
        kind = "function" if id else None
        return {key: value for key, value in (("index", index), ("id", id), ("type", kind), ("function", function)) if value is not None}
    return {"tool_calls": [fragment(*each) for each in fragments]}


def call_parts(*parts):
    """A stream of deltas, or fragments of calls; a list of them is one event."""
    deltas = [part if isinstance(part, dict) else calls(*(part if isinstance(part, list) else [part])) for part in parts]
    return b"".join(map(FakeOpenAI.event, deltas)) + FakeOpenAI.event({}, "tool_calls")


@table({
    # name: (stream, [(name, arguments)])
    "a new id with each fragment": (call_parts((0, "a1", "f", ""), (0, "a2", None, '{"a"'), (0, "a3", "", ":1}")), [("f", '{"a":1}')]),
    "id, then name": (call_parts((0, "a1", None, ""), (0, None, "f", ""), (0, None, None, '{"a":1}')), [("f", '{"a":1}')]),
    "arguments, then name": (call_parts((0, "a1", None, '{"a"'), (0, None, None, ":1}"), (0, None, "f", None)), [("f", '{"a":1}')]),
    "all have index 0 and no id": (call_parts((0, None, "f", '{"a":1}'), (0, None, "g", '{"b":2}')), [("f", '{"a":1}'), ("g", '{"b":2}')]),
    "the same in one event, ids empty": (call_parts([(0, "", "f", '{"a":1}'), (0, "", "f", '{"b":2}')]), [("f", '{"a":1}'), ("f", '{"b":2}')]),
    "all have index 0, but ids": (call_parts((0, "a", "f", '{"a":'), (0, "b", "g", '{"b":'), (0, "a", None, "1}"), (0, "b", None, "2}")), [("f", '{"a":1}'), ("g", '{"b":2}')]),
    "no indexes": (call_parts((None, "a", "f", '{"a":1}'), (None, "b", "f", '{"b":2}')), [("f", '{"a":1}'), ("f", '{"b":2}')]),
    "announced together, filled later": (call_parts([(0, "a", "f", ""), (1, "b", "f", "")], (1, None, None, '{"b":2}'), (0, None, None, '{"a":1}')),
                                         [("f", '{"a":1}'), ("f", '{"b":2}')]),
    "id and name in each fragment": (call_parts((0, "a", "f", '{"a"'), (0, "a", "f", ":1}")), [("f", '{"a":1}')]),
    "the name in each fragment": (call_parts((0, None, "f", '{"a"'), (0, None, "f", ":1}")), [("f", '{"a":1}')]),
    "one id for two calls": (call_parts((0, "a", "f", "{}"), (1, "a", "g", "{}")), [("f", "{}"), ("g", "{}")]),
    "one id for two calls of one function": (call_parts((0, "a", "f", '{"a":1}'), (1, "a", "f", '{"b"'), (1, "a", None, ":2}")), [("f", '{"a":1}'), ("f", '{"b":2}')]),
    "indexes as strings": (call_parts([("0", "a", "f", '{"a"'), ("1", "b", "g", '{"b"')], ("1", None, None, ":2}"), ("0", None, None, ":1}")), [("f", '{"a":1}'), ("g", '{"b":2}')]),
    "indexes as floats": (call_parts([(0.0, "a", "f", '{"a"'), (1.0, "b", "g", '{"b"')], (1.0, None, None, ":2}"), (0.0, None, None, ":1}")), [("f", '{"a":1}'), ("g", '{"b":2}')]),
    "no function, but its fields": (call_parts({"tool_calls": [{"index": 0, "id": "a", "type": "function", "name": "f", "arguments": '{"a":1}'}]}), [("f", '{"a":1}')]),
    "arguments by another name": (call_parts({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "parameters": {"a": 1}}}]}), [("f", '{"a":1}')]),
    "an index that jumps": (call_parts((0, "a", "f", '{"a"'), (7, None, None, ":1}")), [("f", '{"a":1}')]),
    "counted from 1": (call_parts((1, "a", "f", "{}"), (2, "b", "g", "{}")), [("f", "{}"), ("g", "{}")]),
    "arguments as an object": (call_parts((0, "a", "f", {"a": 1})), [("f", '{"a":1}')]),
    "arguments that were encoded twice": (call_parts((0, "a", "f", ""), (0, None, None, json.dumps('{\n"a":"\u00e9"}'))), [("f", '{\n"a":"\u00e9"}')]),
    "a string that looks like these, within arguments": (call_parts((0, "a", "f", '{"a":'), (0, None, None, '"{}"'), (0, None, None, "}")), [("f", '{"a":"{}"}')]),
    "one brace too many": (call_parts((0, "a", "f", '{"a":'), (0, None, None, '"}{"}}'), (0, None, None, "}")), [("f", '{"a":"}{"}')]),
    "a mark after arguments": (call_parts((0, "a", "f", '{"a":[{}]}\n</tool_call>')), [("f", '{"a":[{}]}')]),
    "arguments twice in one fragment": (call_parts((0, "a", "f", '{"a":"\\'), (0, None, None, '""}{"a":"\\""}')), [("f", '{"a":"\\""}')]),
    "empty arguments and others in one fragment": (call_parts((0, "a", "f", '{}{"a":1}')), [("f", '{"a":1}')]),
    "an object for the list": (call_parts(*({"tool_calls": calls(each)["tool_calls"][0]} for each in ((0, "", "f", '{"a"'), (0, "", None, ":1}")))), [("f", '{"a":1}')]),
    "text for arguments": (call_parts((0, "a", "f", " "), (0, None, None, "*** {x}\n"), (0, None, None, "{y} z")), [("f", "*** {x}\n{y} z")]),
    "half a string for arguments": (call_parts((0, "a", "f", '"{\\"a')), [("f", '"{\\"a')]),
    "text in between": (call_parts((0, "a", "f", '{"a"'), {"content": "x", "reasoning_content": "y"}, (0, None, None, ":1}")), [("f", '{"a":1}')]),
    "braces and quotes within strings": (call_parts((0, None, "f", '{"a":"}\\"'), (0, None, "f", '{"}')), [("f", '{"a":"}\\"{"}')]),
    "no arguments": (call_parts((0, "a", "f", None)), [("f", "{}")]),
    "empty arguments in other forms": (call_parts((0, "a", "f", "null"), (1, "b", "g", '""'), (2, "c", "h", " ")), [("f", "{}"), ("g", "{}"), ("h", "{}")]),
    "empty arguments, then others": (call_parts((0, "a", "f", "{}"), (0, None, None, '{"a"'), (0, None, None, ":1}")), [("f", '{"a":1}')]),
    "all arguments once more": (call_parts((0, "a", "f", '{"a"'), (0, None, None, ":1}"), (0, "a", "f", '{"a":1}')), [("f", '{"a":1}')]),
    "all arguments once more, as a string": (call_parts((0, "a", "f", '{"a":1}'), (0, None, None, '"{\\"a\\":1}"')), [("f", '{"a":1}')]),
    "all arguments so far with each fragment": (call_parts((0, "a", "f", ""), (0, "a", None, '{"a"'), (0, "a", None, '{"a":1'), (0, "a", None, '{"a":1}')), [("f", '{"a":1}')]),
    "one call with several indexes": (call_parts((0, "a", "f", '{"a":1}'), (1, "a", "f", '{"a":1}'), (2, "a", "f", '{"a":1}')), [("f", '{"a":1}')]),
    "an object, and more": (call_parts((0, "a", "f", '{"a":1}'), (0, "b", "g", {"b": 2}), (0, None, None, "x")),
                            [("f", '{"a":1}'), ("g", '{"b":2}')]),
})
def test_calls_however_they_are_fragmented(data, expected):
    for parts in pieces(data):
        answer = fold(decoded(akashproxy.ChatDecoder("b"), parts)[0])
        assert [(call.name, call.arguments) for call in answer.tools] == expected and answer.finish == Finish("tool_calls"), parts
        assert len({call.id for call in answer.tools if call.id}) == len([call.id for call in answer.tools if call.id]), "ids differ"


HALF, OTHER_HALF = "\ud83d", "\ude00"


@table({
    # name: (events, expected events)
    "text": ([T("a" + HALF), T(OTHER_HALF + "b")], [T("a😀b")]),
    "reasoning": ([R(HALF), R(OTHER_HALF)], [R("😀")]),
    "arguments": ([ToolCall(0, "", "i", "f"), ToolCall(0, '"' + HALF), ToolCall(0, OTHER_HALF + '"')], [ToolCall(0, "", "i", "f"), ToolCall(0, '"'), ToolCall(0, '😀"')]),
    "arguments of two calls in turn": ([ToolCall(0, HALF), ToolCall(1, HALF), ToolCall(0, OTHER_HALF), ToolCall(1, OTHER_HALF)], [ToolCall(0, "😀"), ToolCall(1, "😀")]),
    "reasoning between the halves": ([T(HALF), R("r"), T(OTHER_HALF)], [R("r"), T("😀")]),
    "a half alone": ([T(HALF), T("b"), T(OTHER_HALF)], [T("\ufffdb\ufffd")]),
    "a half at the end": ([T("a" + HALF), Finish("stop")], [T("a\ufffd"), Finish("stop")]),
    "a half of reasoning at the end": ([R(HALF), ToolCall(0, HALF)], [R("\ufffd"), ToolCall(0, "\ufffd")]),
})
def test_halves_of_a_character_are_joined(events, expected):
    for parts in ([events], [[event] for event in events]):
        step = akashproxy.SurrogateFilter()
        found = [event for part in parts for event in step.feed(part)]
        assert merged(found + step.close()) == expected


def deflated(data, wbits):
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


@table({"gzip": ("gzip", 31), "x-gzip": ("X-Gzip", 31), "deflate": ("deflate", 15), "deflate without a header": ("deflate", -15)})
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_compressed_answer_is_expanded(name, wbits, streamed, path, fake, pool):
    body = b"".join(fake.events()) if streamed else fake.completion()
    packed = deflated(body, wbits)
    head = fake.head("text/event-stream" if streamed else "application/json").replace(b"\r\n\r\n", b"\r\nContent-Encoding: %b\r\n\r\n" % name.encode())
    fake.sends(head + b"".join(chunk(packed[at:at + 7]) for at in range(0, len(packed), 7)) + b"0\r\n\r\n", keep=True)
    got = ask(pool(fake), "POST", path, {"model": "both", "max_tokens": 9, "stream": streamed, "messages": [user("hi")]})
    assert got.status == 200 and "content-encoding" not in got.headers
    assert got.body == body if path.endswith("completions") else b"there." in got.body


@table({"br": ("br", b"x", "Content-Encoding 'br'"), "twice": ("gzip, gzip", b"x", "'gzip, gzip'"), "no gzip": ("gzip", b"not gzip", "connection lost"),
        "cut": ("gzip", deflated(b'{"choices":[{}]}', 31)[:-9], "connection lost"), "a bomb": ("gzip", deflated(bytes(50 << 20), 31), "connection lost")})
def test_other_and_broken_compression_is_the_upstreams_failure(encoding, body, words, fake, pool):
    fake.sends(reply(body=body, extra=f"Content-Encoding: {encoding}\r\n".encode()))
    assert route_of(chat(pool(fake, (FakeOpenAI(), {"priority": 2})), BOTH)) == "a=502, b=200"
    fake.sends(reply(body=body, extra=f"Content-Encoding: {encoding}\r\n".encode()))
    assert words in chat(pool(fake), BOTH).json["error"]["message"]


def test_expanding_is_bounded_and_cut_anywhere():
    data = os.urandom(3000) + b"x" * 3000
    for encoding, wbits in (("gzip", 31), ("deflate", 15), ("deflate", -15)):
        packed = deflated(data, wbits) + (deflated(b"more", wbits) if wbits == 31 else b"")
        for size in (1, 2, 1000, len(packed)):
            decoder = akashproxy.ContentDecoder(encoding)
            assert b"".join(decoder.feed(packed[at:at + size]) for at in range(0, len(packed), size)) == data + (b"more" if wbits == 31 else b"")
            decoder.close()
    with pytest.raises(ProtocolError):
        akashproxy.ContentDecoder("gzip").feed(deflated(bytes(50 << 20), 31))


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "binary/octet-stream", "Text/Event-Stream", None])
@pytest.mark.parametrize("path", WANTS)
def test_a_stream_under_another_type(kind, path, fake, pool):
    head = fake.head(kind) if kind else re.sub(rb"(?i)content-type: [^\r]*\r\n", b"", fake.head())
    fake.sends(head + chunks(*fake.events()), keep=True)
    got = ask(pool(fake), "POST", path, {"model": "both", "max_tokens": 9, "stream": True, "messages": [user("hi")], "input": "hi"})
    assert got.status == 200 and got.headers["content-type"].lower().startswith("text/event-stream")
    assert b"there." in got.body and b'"error":{' not in got.body


@table({
    "no choices": (False, b'{"id":"x","choices":[]}'), "null": (False, b'{"choices":null}'), "empty": (False, b""), "blank": (False, b" \n"),
    "a code": (False, b'{"code":500,"msg":"x"}'), "an error object": (False, b'{"object":"error","message":"x"}'), "half": (False, b'{"choices":[{"mess'),
    "only [DONE]": (True, b"data: [DONE]\n\n"), "nothing": (True, b""), "an error first": (True, ERROR_EVENT), "comments": (True, b": x\n\n"),
    "an error with NaN": (False, b'{"error":{"message":NaN}}'), "half an error": (False, b'{"error":{oops'), "no UTF-8": (False, b'{"error":"\xff"}'),
    "an object for a list": (False, b'{"choices":{}}'), "an empty choice": (False, b'{"choices" : [ {} ]}'), "an error in a choice": (False, b'{"choices":[{"message":{"content":"a"},"error":{"message":"x"}}]}'), "null as a choice": (False, b'{"choices":[null]}'), "a list": (False, b"[]"),
    "a role, then [DONE]": (True, FakeOpenAI.event(assistant("")) + b"data: [DONE]\n\n"), "no choice, then [DONE]": (True, b'data: {"choices":[]}\n\ndata: [DONE]\n\n'),
    "an error in words": (True, b"event: error\ndata: x\n\n"), "a role, then an error in words": (True, FakeOpenAI.event(assistant("")) + b"event: error\ndata: x\n\n"),
    "a role, then an error": (True, FakeOpenAI.event({"role": "assistant"}) + ERROR_EVENT), "a role, then nothing": (True, FakeOpenAI.event({"role": "assistant"})),
})
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("typed", [True, False])
def test_a_200_that_is_no_answer_fails_over(streamed, body, path, sized, typed, fake, pool):
    kind = b"text/plain" if not typed else b"text/event-stream" if streamed else b"application/json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind + (b"Content-Length: %d\r\n\r\n" % len(body) if sized else b"Connection: close\r\n\r\n")
    fake.sends(head + body)
    got = ask(pool(fake, (FakeOpenAI(), {"priority": 2})), "POST", path, {"model": "both", "max_tokens": 9, "stream": streamed, "messages": [user("hi")]})
    assert got.status == 200 and re.fullmatch(r"a=50\d, b=200", route_of(got)) and b"there." in got.body


@pytest.mark.parametrize("call, error", [({"id": "a", "function": {"arguments": "{}"}}, True), ({"id": "a", "function": {"name": "", "arguments": ""}}, False), ({}, False)])
def test_whole_calls_without_a_name(call, error, fake, pool):
    body = {"choices": [{"message": {"content": "x", "tool_calls": [call]}, "finish_reason": "tool_calls"}]}
    fake.sends(reply(body=body), keep=True)
    got = ask(pool(fake), "POST", "/v1/messages", {"model": "both", "max_tokens": 9, "messages": [user("hi")]})
    if error:
        assert got.status == 502 and "without a name" in got.json["error"]["message"]
    else:
        assert got.json["stop_reason"] == "end_turn" and [block["type"] for block in got.json["content"]] == ["text"]


@table({
    "DeepSeek": ({"prompt_cache_hit_tokens": 80}, 80, 0, 5), "Moonshot": ({"cached_tokens": 80}, 80, 0, 5), "OpenAI": ({"prompt_tokens_details": {"cached_tokens": 80}}, 80, 0, 5),
    "reasoning apart": ({"reasoning_tokens": 4}, 0, 4, 5), "no total": ({"total_tokens": None}, 0, 0, 5), "a total of 0": ({"total_tokens": 0}, 0, 0, 5), "all cached": ({"prompt_cache_hit_tokens": 100}, 100, 0, 5),
    "more cached than sent": ({"cached_tokens": 500}, 100, 0, 5), "thinking": ({"completion_tokens_details": {"thinking_tokens": 3}}, 0, 3, 5), "no details": ({"prompt_tokens_details": None}, 0, 0, 5),
    "Responses": ({"prompt_tokens": None, "input_tokens": 100, "completion_tokens": None, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 80},
                   "output_tokens_details": {"reasoning_tokens": 4}}, 80, 4, 5),
    "Anthropic": ({"prompt_tokens": None, "input_tokens": 20, "completion_tokens": None, "output_tokens": 5, "cache_read_input_tokens": 80}, 80, 0, 5),
    "reasoning counted apart": ({"completion_tokens": 9, "total_tokens": 169, "completion_tokens_details": {"reasoning_tokens": 60}}, 0, 60, 69),
    "reasoning only": ({"completion_tokens": 0, "total_tokens": 160, "reasoning_tokens": 60}, 0, 60, 60),
    "reasoning within": ({"completion_tokens": 69, "total_tokens": 169, "completion_tokens_details": {"reasoning_tokens": 60}}, 0, 60, 69),
    "more reasoning than there is": ({"completion_tokens": 9, "total_tokens": None, "completion_tokens_details": {"reasoning_tokens": 60}}, 0, 9, 9),
})
def test_spellings_of_usage(extra, cached, reasoning, completion):
    usage = akashproxy.chat_usage({"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, **extra})
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (100, completion, 100 + completion)
    assert (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) == cached
    assert (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0) == reasoning


@pytest.mark.parametrize("usage, read, written", [
    ({"prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30}}, 60, 30), ({"prompt_tokens_details": {"cache_creation_tokens": 30}}, 0, 30),
    ({"cache_creation_input_tokens": 30, "cache_read_input_tokens": 60}, 60, 30), ({"prompt_tokens_details": {"cached_tokens": 100}}, 100, 0),
    ({"prompt_tokens_details": {"cached_tokens": 80, "cache_write_tokens": 90}}, 80, 20), ({}, 0, 0),
])
def test_tokens_in_caches_are_counted_once(usage, read, written, streamed, fake, pool):
    usage = {"prompt_tokens": 100, "completion_tokens": 5, **usage}
    server = pool(fake.faulting(*[answered({"content": "a"}, usage=usage)] * 2))
    got = ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed})
    found = named_events(got.body)[-2]["usage"] if streamed else got.json["usage"]
    assert found == {"input_tokens": 100 - read - written, "cache_read_input_tokens": read, "cache_creation_input_tokens": written, "output_tokens": 5}
    got = ask(server, "POST", "/v1/responses", {**WANTED, "stream": streamed})
    found = (named_events(got.body)[-1]["response"] if streamed else got.json)["usage"]
    assert found["input_tokens"] == 100 and found["input_tokens_details"] == {"cached_tokens": read, "cache_write_tokens": written}


COUNTED = b'"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}'
ANTHROPIC = (b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":9,"cache_read_input_tokens":2,"output_tokens":1}}}\n\n'
             b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}\n\n'
             b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


@pytest.mark.parametrize("path, kind, body", [
    ("/v1/chat/completions", "application/json", b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],%b}' % COUNTED),
    ("/v1/embeddings", "application/json", b'{"data":[{"embedding":[1]}],%b}' % COUNTED),
    ("/v1/chat/completions", "application/json", b'\xef\xbb\xbf{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],%b}' % COUNTED),
    ("/v1/chat/completions", "text/event-stream", FakeOpenAI.event({"content": '\\"usage\\":{}'}) + FakeOpenAI.event({}, "stop") + b'data: {"choices":[],%b}\n\ndata: [DONE]\n\n' % COUNTED),
    ("/v1/chat/completions", "text/event-stream", b"".join(FakeOpenAI.event({"content": "a" * 300})[:-3] + b',"usage":{"prompt_tokens":11,"completion_tokens":%d}}\n\n' % count
                                                           for count in range(8)) + FakeOpenAI.event({}, "stop") + b"data: [DONE]\n\n"),
    ("/v1/chat/completions", "application/json", b'{%b,"choices":[{"message":{"content":"usage"},"logprobs":[{"token":"usage"}],"finish_reason":"stop"}],"tools":{"usage":{}}}' % COUNTED),
    ("/v1/chat/completions", "text/event-stream", FakeOpenAI.event({"content": "a"}) + b'data: {"choices":[],%b}\n\n' % COUNTED + b": wait\n\n" * 12
     + FakeOpenAI.event({}, "stop")[:-3] + b',"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\ndata: {"choices":[],"usage":null}\n\ndata: [DONE]\n\n'),
    ("/v1/messages", "text/event-stream", ANTHROPIC),
    ("/v1/messages", "text/event-stream", ANTHROPIC.replace(b'{"output', b'{"input_tokens":0,"output').replace(b"event: message_stop", b"event: ping\n\n" * 12 + b"event: message_stop")),
    ("/v1/messages", "text/event-stream", ANTHROPIC.replace(b"event: message_delta", b'event: content_block_delta\ndata: {"type":"content_block_delta","text":"%b"}\n\nevent: message_delta' % (b"x" * 5000))),
    ("/v1/responses", "text/event-stream", b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":11,"output_tokens":7},"output":"%b"}}\n\n' % (b"x" * 5000)),
    ("/v1/responses", "application/json", b'{"object":"response","output":[],"usage":{"input_tokens":11,"output_tokens":7}}'),
])
def test_the_usage_of_relayed_answers_is_logged_and_counted(path, kind, body, fake, pool, log):
    server = pool((fake.sends(reply(body=body, kind=kind), keep=True), {"paths": ["*"]}))
    sent = {"model": "both", "stream": kind != "application/json", "max_tokens": 9, "messages": [user("x")], "input": "x"}
    assert ask(server, "POST", path, sent).body == body
    wait_for(lambda: "tokens_in=11 tokens_out=7" in log.text)
    assert samples(server)["akashproxy_prompt_tokens_total", "a"] == 11


RESPONDED = b'data: {"type":"response.output_text.delta","delta":"a"}\n\nevent: response.%b\ndata: {"type":"response.%b","response":{"usage":{"input_tokens":11,"output_tokens":7}}}\n\n'


@pytest.mark.parametrize("ended", [lambda fake, body: fake.raw(fake.head() + chunk(body)), lambda fake, body: Fake.stall(fake, fake.head() + chunk(body)),
                                   lambda fake, body: fake.raw(fake.head() + chunk(body) + chunk(b"data: [DO"))], ids=["cut", "left open", "cut in what follows"])
@pytest.mark.parametrize("path, body", [("/v1/messages", ANTHROPIC), *(("/v1/responses", RESPONDED % (end, end)) for end in (b"completed", b"incomplete", b"failed"))])
def test_a_relayed_stream_is_complete_with_its_last_event(path, body, ended, fake, pool, log):
    fake.faults.append(ended(fake, body))
    got = ask(pool((fake, {"paths": ["*"]})), "POST", path, {"model": "both", "stream": True, "max_tokens": 9, "messages": [user("x")], "input": "x"})
    assert got.body.startswith(body) and b"error" not in got.body[len(body):]
    wait_for(lambda: "ended=whole" in log.text and "tokens_in=11 tokens_out=7" in log.text)


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n", b"\r"], ids=["LF", "CR LF", "CR"])
@pytest.mark.parametrize("own", ["first", "last"])
@pytest.mark.parametrize("path, last", [("/v1/messages", "message_stop"), ("/v1/responses", "response.completed")])
def test_only_its_own_type_makes_an_event_the_end(path, last, own, line_break):
    def event(type, **fields):
        fields = {"type": type, **fields} if own == "first" else {**fields, "type": type}
        return b"data: %b\n\n" % json.dumps(fields, separators=(",", ":")).encode()

    echo = {"metadata": {"type": last}, "tools": [{"type": last}, {"type": last}]}
    begun = event("text", text="a") + event("content_block_start", content_block={"input": echo}) + event("response.output_item.done", item=echo)
    begun, data = (part.replace(b"\n", line_break) for part in (begun, begun + event(last, response=echo)))
    for at in range(len(data) + 1):
        decoder = akashproxy.PassthroughDecoder("up", akashproxy.STREAM_ENDS[path])
        parts = [part.data for part in decoder.feed(data[:at])]
        assert not decoder.complete or at > len(begun)
        parts += [part.data for part in [*decoder.feed(data[at:]), *decoder.close()]]
        assert not decoder.error and b"".join(parts).rstrip() == data.rstrip()
    decoder = akashproxy.PassthroughDecoder("up", akashproxy.STREAM_ENDS[path])
    decoder.feed(begun)
    decoder.close()
    assert "ended its answer early" in decoder.error.message


@table({
    # name: (bytes, events, what the error says)
    "plain": (b"".join(FakeOpenAI.words("Hi there.")), [T("Hi there."), Finish("stop")], None),
    "CR LF, comments and other fields": (b": ping\r\n\r\nevent: x\r\nid: 1\r\nretry: 9\r\ndata:{\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n"
                                         b"data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\r\n\r\ndata: [DONE]\r\n\r\n",
                                         [T("a"), Finish("length")], None),
    "several data lines": (b'data: {"choices":\ndata: [{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n', [T("a"), Finish("stop")], None),
    "no [DONE]": (b"".join(FakeOpenAI.words("Hi"))[:-len("data: [DONE]\n\n")], [T("Hi"), Finish("stop")], None),
    "no last blank line": (FakeOpenAI.event({"content": "a"}, "stop")[:-1], [T("a"), Finish("stop")], None),
    "usage in two parts, then zeros": (b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":0}}\n\n' + FakeOpenAI.event({"content": "a"}, "stop")
                                       + b'data: {"choices":[],"usage":{"prompt_tokens":null,"completion_tokens":7}}\n\ndata: {"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n',
                                       [T("a"), Finish("stop", USAGE)], None),
    "usage of nothing": (FakeOpenAI.event({}, "stop")[:-3] + b',"usage":{"prompt_tokens":11,"completion_tokens":0}}\n\n',
                         [Finish("stop", {"prompt_tokens": 11, "completion_tokens": 0, "total_tokens": 11})], None),
    "usage after the end": (FakeOpenAI.event({"content": "a"}, "stop") + b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7}}\n\n'
                            b"data: [DONE]\n\n", [T("a"), Finish("stop", USAGE)], None),
    "usage before it": (b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}\n\n'
                        + FakeOpenAI.event({"content": "a"}, "stop"), [T("a"), Finish("stop", USAGE)], None),
    "null usage": (b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}],"usage":{"prompt_tokens":null}}\n\n',
                   [T("a"), Finish("stop")], None),
    "reasoning_content": (FakeOpenAI.event({"reasoning_content": "h"}) + FakeOpenAI.event({"content": "a"}, "stop"), [R("h"), T("a"), Finish("stop")], None),
    "reasoning": (FakeOpenAI.event({"reasoning": "h", "content": None}) + FakeOpenAI.event({"content": "a"}, "stop"), [R("h"), T("a"), Finish("stop")], None),
    "tool calls": (call_parts((0, "c0", "f", ""), (0, None, None, '{"a"'), (1, "c1", "g", ""), (0, None, None, ":1}")), [
        ToolCall(0, "", "c0", "f"), ToolCall(0, '{"a"'), ToolCall(1, "", "c1", "g"), ToolCall(0, ":1}"), Finish("tool_calls")], None),
    "a second choice": (b'data: {"choices":[{"index":1,"delta":{"content":"b"}},{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n',
                        [T("a"), Finish("stop")], None),
    "the legacy form": (b'data: {"choices":[{"index":0,"text":"a","finish_reason":"stop"}]}\n\n', [T("a"), Finish("stop")], None),
    "a whole completion as an event": (b'data: {"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}\n\n', [T("a"), Finish("stop")], None),
    "deltas beside the message so far": (b'data: {"choices":[{"delta":{"content":"a"},"message":{"content":"a"}}]}\n\n'
                                         b'data: {"choices":[{"delta":{},"message":{"content":"a"},"finish_reason":"stop"}]}\n\n', [T("a"), Finish("stop")], None),
    "the message once more at the end": (FakeOpenAI.event({"reasoning_content": "h"}) + FakeOpenAI.event({"content": "a"}) + FakeOpenAI.event(calls((0, "c", "f", "{}")))
                                         + b'data: {"choices":[{"message":{"reasoning_content":"h","content":"a","tool_calls":[{"id":"c","function":{"name":"f","arguments":"{}"}}]},'
                                         b'"finish_reason":"tool_calls"}]}\n\n', [R("h"), T("a"), ToolCall(0, "", "c", "f"), Finish("tool_calls")], None),
    "another mark at the end": (FakeOpenAI.event({"content": "a"}, "stop") + b"data: [END]\n\n", [T("a"), Finish("stop")], None),
    "such a mark too early": (FakeOpenAI.event({"content": "a"}) + b"data: [END]\n\n", [T("a")], "not JSON"),
    "a part with a refusal": (FakeOpenAI.event({"content": [{"type": "refusal", "refusal": "no"}]}, "stop"), [T("no"), Finish("stop")], None),
    "a refusal after text": (FakeOpenAI.event({"content": "a", "refusal": "no"}, "stop"), [T("a"), akashproxy.Refusal("no"), Finish("stop")], None),
    "a refusal": (FakeOpenAI.event({"content": None, "refusal": ""}) + FakeOpenAI.event({"refusal": "no"}, "stop"), [akashproxy.Refusal("no"), Finish("stop")], None),
    "an error within": (FakeOpenAI.event({"content": "a"}) + ERROR_EVENT, [T("a")], "boom"),
    "an error in words": (FakeOpenAI.event({"content": "a"}) + b"event: error\ndata: boom\n\n", [T("a")], "boom"),
    "an error by its event": (b'event: error\ndata: {"reason":"boom"}\n\n', [], "boom"),
    "an error as text": (b'data: {"error":"boom"}\n\n', [], "boom"),
    "it just ends": (FakeOpenAI.event({"content": "a"}), [T("a")], EARLY),
    "[DONE] without a finish": (FakeOpenAI.event({"content": "a"}) + b"data: [DONE]\n\n", [T("a")], EARLY),
    "no JSON": (b"data: {oops\n\n", [], "not JSON"),
    "a reason to end that is no text": (FakeOpenAI.event({"content": "a"}, ["stop"]) + b"data: [DONE]\n\n", [T("a")], EARLY),
    "a call without a name": (call_parts((0, "a", None, "{}")), [], "without a name"),
    "odd shapes": (b'data: {"choices":[null,{"delta":7},{"delta":{"content":7,"tool_calls":[7]}}]}\n\n' + FakeOpenAI.event({"content": "a"}, "stop"),
                   [T("a"), Finish("stop")], None),
    "CR alone": (FakeOpenAI.event({"content": "a"}, "stop").replace(b"\n", b"\r"), [T("a"), Finish("stop")], None),
    "a byte order mark": (b"\xef\xbb\xbf" + FakeOpenAI.event({"content": "a"}, "stop"), [T("a"), Finish("stop")], None),
    "empty data": (b"data:\n\n" + FakeOpenAI.event({"content": "a"}) + b"data: \n\ndata: null\n\ndata: 7\n\n" + FakeOpenAI.event({}, "stop"), [T("a"), Finish("stop")], None),
    "empty data lines": (FakeOpenAI.event({"content": "a"}) + b"data:\ndata:\n\n" + FakeOpenAI.event({"content": "b"}, "stop"), [T("ab"), Finish("stop")], None),
    "a ping in words": (b"event: keepalive\ndata: still here\n\n" + FakeOpenAI.event({"content": "a"}, "stop"), [T("a"), Finish("stop")], None),
    "no blank lines between": (b"".join(FakeOpenAI.words("Hi there.")).replace(b"\n\n", b"\n"), [T("Hi there."), Finish("stop")], None),
    "no line end at the end": (FakeOpenAI.event({"content": "a"}) + FakeOpenAI.event({"content": "b"}, "stop").rstrip(b"\n"), [T("ab"), Finish("stop")], None),
    "half an event at the end": (FakeOpenAI.event({"content": "a"}) + FakeOpenAI.event({"content": "b"}, "stop")[:40], [T("a")], "not JSON"),
    "an emoji in two events": (b'data: {"choices":[{"delta":{"content":"a\\ud83d"}}]}\n\ndata: {"choices":[{"delta":{"content":"\\ude00b"},"finish_reason":"stop"}]}\n\n',
                               [T("a\U0001f600b"), Finish("stop")], None),
    "thinking parts": (FakeOpenAI.event({"content": [{"type": "thinking", "thinking": [text_part("h")]}]})
                       + FakeOpenAI.event({"content": [text_part("a")]}, "stop"), [R("h"), T("a"), Finish("stop")], None),
    "reasoning parts": (FakeOpenAI.event({"content": [{"type": "reasoning", "text": "h"}, text_part("a")]}, "stop"), [R("h"), T("a"), Finish("stop")], None),
    "content as an object": (FakeOpenAI.event({"content": text_part("a")}) + FakeOpenAI.event({"content": {"type": "thinking", "thinking": "h"}}, "stop"), [T("a"), R("h"), Finish("stop")], None),
    "parts with a value, strings and others": (FakeOpenAI.event({"content": [{"type": "text", "text": {"value": "a", "annotations": []}}, "b", None, 7, {"type": "reference", "reference_ids": [1]}]}, "stop"),
                                               [T("ab"), Finish("stop")], None),
    "null as a string": (FakeOpenAI.event({"content": "a"}, "null") + FakeOpenAI.event({"content": "b"}, "stop"), [T("ab"), Finish("stop")], None),
    "Python's null as a string, then nothing": (FakeOpenAI.event({"content": "a"}, "None"), [T("a")], EARLY),
    "null as a string, then nothing": (FakeOpenAI.event({"content": "a"}, "null"), [T("a")], EARLY),
    "an error in a choice": (b'data: {"choices":[{"delta":{"content":""},"error":{"message":"boom"},"finish_reason":"error"}]}\n\n', [], "boom"),
    "llama.cpp's field": (b'error: {"code":400,"message":"boom"}\n\ndata: [DONE]\n\n', [], "boom"),
    "llama.cpp's field after text": (FakeOpenAI.event({"content": "a"}) + b'error: {"code":400,"message":"boom"}\n\n', [T("a")], "boom"),
    "a code and words": (b'data: {"code":500,"msg":"boom"}\n\n', [], "boom"),
    "words of a recording": (FakeOpenAI.event({"audio": {"id": "a", "transcript": "b"}}) + FakeOpenAI.event({"audio": {"transcript": "c"}}, "stop"), [T("bc"), Finish("stop")], None),
    **{f"reasoning as {reasoning}": (FakeOpenAI.event(reasoning) + FakeOpenAI.event({"content": "a"}, "stop"), [R("h"), T("a"), Finish("stop")], None) for reasoning in (
        {"reasoning": "h"}, {"reasoning": {"content": "h"}}, {"reasoning_content": [text_part("h")]}, {"reasoning_text": "h", "reasoning_opaque": "x"}, {"thinking": "h"},
        {"reasoning": "h", "reasoning_details": [{"type": "reasoning.text", "text": "h"}]}, {"reasoning_details": [{"type": "reasoning.summary", "summary": "h"}]})},
    "Groq's usage": (FakeOpenAI.event({"content": "a"}, "stop")[:-3] + b',"x_groq":{"usage":{"prompt_tokens":11,"completion_tokens":7}}}\n\n', [T("a"), Finish("stop", USAGE)], None),
})
def test_openai_streams_cut_at_every_byte(data, expected, error):
    decodes_cut_at_every_byte(lambda: akashproxy.ChatDecoder("b"), data, expected, error)


CREATED = b'data: {"type":"response.created","response":{"object":"response","error":null}}\n\n'


@pytest.mark.parametrize("path, body, status", [
    ("/v1/chat/completions", b'error: {"code":400,"message":"it exceeds the available context size"}\n\ndata: [DONE]\n\n', 400),
    ("/v1/chat/completions", b'data: {"code":500,"msg":"it exceeds"}\n\n', 500),
    ("/v1/chat/completions", b'data: {"detail":"it exceeds"}\n\n', 502),
    ("/v1/chat/completions", b"event: error\r\ndata: it exceeds\r\n\r\n", 502),
    ("/v1/chat/completions", b'event: error\ndata: {"status":429,"reason":"it exceeds"}\n\n', 429),
    ("/v1/chat/completions", {"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": {"code": 400, "message": "it exceeds"}}]}, 400),
    ("/v1/chat/completions", b'data: {"choices":null,"base_resp":{"status_code":1000,"status_msg":"it exceeds"}}\n\n', 502),
    ("/v1/chat/completions", b'data: {"error":{"code":429,"message":"it exceeds"},"choices":[{"delta":{"content":""},"finish_reason":"error"}]}\n\ndata: [DONE]\n\n', 429),
    ("/v1/responses", b'data: {"type":"keepalive"}\n\n' + CREATED + b'data: {"type":"response.failed","response":{"object":"response","error":{"code":"rate_limit_exceeded","message":"it exceeds"}}}\n\n', 429),
    ("/v1/chat/completions", {"code": 500, "msg": "it exceeds", "success": False}, 500),
    ("/v1/chat/completions", {"choices": None, "base_resp": {"status_code": 1000, "status_msg": "it exceeds"}}, 502),
])
def test_errors_in_place_of_relayed_answers(path, body, status, fake, b, pool):
    server, is_stream = pool((fake, {"paths": ["*"]}), (b, {"priority": 2})), isinstance(body, bytes)
    for _ in range(2):
        fake.sends(reply(body=body, kind="text/event-stream" if is_stream else "application/json"))
        got = ask(server, "POST", path, {"model": "both", "stream": is_stream, "messages": [user("x")], "input": "x"})
        if status == 400:
            assert got.status == 400 and "exceeds" in got.json["error"]["message"]
        else:
            assert got.status == 200 and re.match(f"a={status}, b=200|b=200", route_of(got)) and (b"from" in got.body)


@pytest.mark.parametrize("choice, expected", [({"stop_reason": "##"}, ("stop_sequence", "##")), ({"matched_stop": "##"}, ("stop_sequence", "##")), ({"stop_reason": 128008}, ("end_turn", None)),
                                              ({"stop_reason": "end_turn"}, ("end_turn", None)), ({"matched_stop": None}, ("end_turn", None))])
def test_the_stop_sequence_that_an_upstream_names(choice, expected, streamed, fake, pool):
    event = FakeOpenAI.event({"content": "a"}) + b"data: " + json.dumps({"choices": [{"delta": {}, "finish_reason": "stop", **choice}]}).encode() + b"\n\n"
    fake.sends(fake.head() + chunks(event) if streamed else reply(body={"choices": [{"message": {"content": "a"}, "finish_reason": "stop", **choice}]}))
    got = ask(pool(fake), "POST", "/v1/messages", {**ASKED, "stream": streamed, "stop_sequences": ["x", "##"]})
    last = named_events(got.body)[-2]["delta"] if streamed else got.json
    assert (last["stop_reason"], last["stop_sequence"]) == expected


@table({
    # name: (the message's fields, or a delta, the text that the client gets)
    "OpenRouter's": ({"content": "Here:", "images": [{"type": "image_url", "index": 0, "image_url": {"url": DATA_URL}}]}, f"Here:![]({DATA_URL})"),
    "two, without a text": ({"content": None, "images": [{"image_url": {"url": DATA_URL}}, {"image_url": "https://h/x.png"}]}, f"![]({DATA_URL})![](https://h/x.png)"),
    "a part of its content": ({"content": [text_part("Here:"), picture("https://h/x.png")]}, "Here:![](https://h/x.png)"),
    "odd ones": ({"content": "a", "images": [None, {}, {"image_url": None}, {"image_url": {"url": 7}}, "x"]}, "a"),
})
@pytest.mark.parametrize("dialect", ["completions", "messages", "responses"])
def test_images_of_a_chat_are_markdown(message, text, dialect, streamed, fake, pool):
    fake.sends(fake.head() + chunks(FakeOpenAI.event(message), FakeOpenAI.event({}, "stop")) if streamed else reply(body={"choices": [{"message": message, "finish_reason": "stop"}]}))
    path, body, reader, taken_apart, _ = DIALECTS[dialect]
    got = ask(pool((fake, {"paths": ["/none"]})), "POST", path, {**body, "model": "both", "stream": streamed})
    assert fold(reader(taken_apart(got.body) if streamed else got.json)).text.replace("\n\n", "") == text and "data" not in (got.json or {})


@pytest.mark.parametrize("choice, status", [({}, 200), ({"finish_reason": None}, 200), ({"finish_reason": ""}, 200), ({"finish_reason": "null"}, 200),
                                            ({"finish_reason": None, "message": {"content": ""}}, 502), ({"finish_reason": None, "message": None}, 502)])
def test_a_whole_answer_needs_no_reason_to_end(choice, status, fake, pool):
    got = ask(pool(fake.sends(reply(body={"choices": [{"message": {"content": "a"}, **choice}]}))), "POST", "/v1/messages", ASKED)
    assert got.status == status and (status == 502 or got.json["stop_reason"] == "end_turn")


@table({
    **{f"a message, {reason}": ("/v1/messages", ANTHROPIC[:ANTHROPIC.index(b"event: message_stop")].replace(b'"end_turn"', reason), error)
       for reason, error in ((b'"end_turn"', False), (b"null", True))},
    **{f"a chat, {reason!r}": ("/v1/chat/completions", FakeOpenAI.event({"content": "a"}) + FakeOpenAI.event({}, reason), error)
       for reason, error in (("STOP", False), ("MAX_TOKENS", False), ("null", True), ("", True))},
})
def test_a_relayed_stream_without_its_last_event_needs_a_reason_to_end(path, body, error, fake, pool):
    got = ask(pool((fake.sends(reply(body=body, kind=EVENTS)), {"paths": ["*"]})), "POST", path, {**WANTS[path], "stream": True})
    assert got.body.startswith(body) and (b"ended its answer early" in got.body) == error


def test_echo(serve):
    server = serve(controllers=(ECHO,))
    assert str(server.pool) == "echo (echo)"    # it has no address
    assert stream(server, {"model": "echo", "messages": [user("say this back")]})[0] == "say this back"
    got = chat(server, {"model": "any", "messages": [user([text_part("and this")])]})
    assert text_of(got) == "and this" and got.json["usage"]["total_tokens"] == 4
    for count, status in ((1, 404), (20, 400)):
        assert ask(server, "POST", "/v1/images/generations", {"prompt": "x", "n": count}).status == status
    for prompt in ("a b  c \n", "   ", "x " * 30_000):
        got = chat(server, {"model": "echo", "messages": [user(prompt)]}).json
        assert got["choices"][0]["message"]["content"] == prompt, prompt[:9]
        assert got["usage"]["completion_tokens"] <= 10_000, "it has few events"


# == pool =====================================================================================


def exchange(pool, model="m"):
    """A call without any attempt yet."""
    return akashproxy.Exchange(pool, Call({"model": model}))


def members_of(weights, kind="balanced", max_wait=3.0, **more):
    options = [akashproxy.ControllerSettings(type="echo", name=name, weight=weight, **more) for name, weight in weights.items()]
    return akashproxy.Pool(Settings(controllers=tuple(options), pool_type=kind, max_wait=max_wait), clock=Clock())


@table({
    "balanced is smooth": ({"a": 5, "b": 1, "c": 1}, "aabacaa" * 2), "fractions": ({"a": 0.5, "b": 0.25}, "abaaba"),
    "0 is off": ({"a": 0, "b": 1}, "bbbbb"),
})
def test_choices_by_weight(weights, names):
    pool = members_of(weights)
    assert "".join(pool.acquire(exchange(pool)).name for _ in names) == names


def test_ten_thousand_choices_of_many_threads_are_exact():
    pool = members_of({"a": 5, "b": 3, "c": 2})
    names = at_once(lambda: pool.acquire(exchange(pool)).name, 10000)
    assert collections.Counter(names) == {"a": 5000, "b": 3000, "c": 2000}


def test_random_is_by_weight():
    pool = members_of({"a": 3, "b": 1}, "random")
    counts = collections.Counter(pool.choose(pool.upstreams).name for _ in range(4000))
    assert set(counts) == {"a", "b"} and 2800 < counts["a"] < 3200


def test_least_busy_is_by_requests_in_flight():
    pool = members_of({"a": 2, "b": 1}, "least_busy")
    assert "".join(pool.acquire(exchange(pool)).name for _ in range(6)) in ("abaaba", "ababaa", "abaaab")
    assert {member.name: member.in_flight for member in pool.upstreams} == {"a": 4, "b": 2}
    for _ in range(4):
        pool.release(pool.upstreams[0], None, True, 0)
    assert pool.acquire(exchange(pool)).name == "a"


def stop_of(number, category=None, **more):
    return APIError(number, "x", category=category and Category(category), **more)


NETWORK, AUTH, SERVER, LIMITED = stop_of(502, category="network"), stop_of(502, category="auth"), stop_of(502), stop_of(429)


def far_apart(*errors, then):
    """Steps of an error each, long after one another, the last of which cools down for some seconds."""
    return [(200 * at, error, then if at == len(errors) - 1 else None) for at, error in enumerate(errors)]


@table({
    # name: [(when a request ended, its error or None, for how long the controller then cools down or None, when it had begun if not then)]
    "a limit for as long as it said": [(0, stop_of(429, retry_after=7200), 7200)],
    "the later deadline wins": [(0, stop_of(429, retry_after=90), 90), (0, stop_of(429, retry_after=5), 90)],
    "a limit that says nothing grows": [(0, LIMITED, seconds) for seconds in (1, 2, 4)],
    "a dead key for long": [(0, AUTH, 600)],
    "a blip briefly and growing, to an end": [(0, NETWORK, seconds) for seconds in (1, 2, 4, 8, 16, 32, 60, 60, 60)],
    "a 5xx only if it goes on": [(0, SERVER, seconds) for seconds in (0, 0, 1, 2, 4)],
    "a client's mistake never": [(0, stop_of(400), 0)] * 5, "an unknown model never": [(0, stop_of(404), 0)] * 5,
    "a success ends it": [(0, NETWORK, 1), (0, None, 0), (0, NETWORK, 1)],
    "a blip that hits many requests once": [(1, NETWORK, 1, 0)] * 10,
    "a success that had begun before it does not end it": [(10, stop_of(429, retry_after=60), 60, 0), (11, None, 59, 5), (12, None, 0)],
    # -- the back-off of each kind doubles on its own
    "a limit after blips": far_apart(*[NETWORK] * 7, LIMITED, then=1), "a blip after limits": far_apart(*[LIMITED] * 7, NETWORK, then=1),
    "a 5xx after blips": far_apart(*[NETWORK] * 7, SERVER, then=0), "a limit after clients' mistakes": far_apart(*[stop_of(400)] * 7, LIMITED, then=1),
    "a limit after a success": far_apart(*[LIMITED] * 3, None, LIMITED, then=1), "a third limit": far_apart(*[LIMITED] * 3, then=4),
    "a 5xx that says when": [(0, stop_of(503, retry_after=30), 30)], "our own lack": [(0, stop_of(503, category="local"), 0)],
    # -- a key that serves is not dead by one refusal
    "a key that served just now": [(0, None, 0), (1, AUTH, 0)], "one that served long ago": [(0, None, 0), (400, AUTH, 600)],
    "one that is refused twice in a row": [(0, None, 0), (1, AUTH, 0), (2, AUTH, 600)],
    "two refusals at once": [(0, None, 0), (1, AUTH, 0), (1, AUTH, 0, 0.5)],
    "a success between two": [(0, None, 0), (1, AUTH, 0), (2, None, 0), (3, AUTH, 0)],
})
def test_cool_downs(case):
    member = members_of({"a": 1}).upstreams[0]
    for at, error, seconds, *began in case:
        member.record_result(error, 1000.0 + at, 1000.0 + (began or [at])[0])
        assert seconds in (None, max(0, member.available_at("m") - 1000 - at)), at


LIMIT = b"Retry-After: 7\r\n"


does, HANGS_UP = operator.methodcaller, operator.methodcaller("refuse", 2)       # the first time maybe on a kept connection


@table({
    # name: (fault of a, the status that it gives, the client's when a is alone, code, does b answer then, does a cool down)
    "refused": (HANGS_UP, 502, 502, "upstream_error", True, True),
    "garbage": (does("raw", b"\0\1\2"), 502, 502, "upstream_error", True, True),
    "silence": (does("stall"), 504, 504, "timeout", True, True),
    "cut before the first event": (does("raw", FakeOpenAI.head()), 502, 502, "upstream_error", True, True),
    "401": (does("status", 401), 401, 424, "upstream_auth", True, True),
    "402": (does("status", 402), 402, 424, "upstream_auth", True, True),
    "403 of a key": (does("status", 403, b'{"error":{"message":"API key not valid."}}'), 403, 424, "upstream_auth", True, True),
    "403 of a request": (does("status", 403), 403, 403, "c", True, False),
    "404": (does("status", 404), 404, 404, "c", True, False),
    "408": (does("status", 408, extra=LIMIT), 408, 408, "c", True, True),
    "409": (does("status", 409, extra=LIMIT), 409, 409, "c", True, True),
    "425": (does("status", 425, extra=LIMIT), 425, 425, "c", True, True),
    "429": (does("status", 429, extra=LIMIT), 429, 429, "c", True, True),
    "429 of a spent quota": (does("status", 429, b'{"error":{"message":"m","code":"insufficient_quota"}}'), 429, 424, "upstream_auth", True, True),
    "429 with status 200": (does("raw", reply(200, b'{"error":{"message":"try again in 7s","code":429}}')), 429, 429, "rate_limit_exceeded", True, True),
    "400": (does("status", 400), 400, 400, "c", False, False),
    "413": (does("status", 413), 413, 413, "c", False, False),
    "422": (does("status", 422), 422, 422, "c", False, False),
    "500": (does("status", 500), 500, 502, "c", True, False),
    "503": (does("status", 503, b"<html>busy</html>"), 503, 503, "upstream_error", True, False),
    "503 with a time": (does("status", 503, extra=LIMIT), 503, 503, "c", True, True),
    "529 with a time": (does("status", 529, extra=LIMIT), 529, 503, "c", True, True),
    "a redirect": (does("status", 302, extra=b"Location: http://127.0.0.1:1/\r\n"), 302, 502, "c", True, False),
    "an error as the first event": (does("raw", FakeOpenAI.head() + chunks(b": hi\n\n" + ERROR_EVENT)), 500, 502, "upstream_error", True, False),
    "it ends without a finish": (does("early"), 502, 502, "upstream_error", "not streamed", True),
    "cut after the first event": (does("cut"), 502, 502, "upstream_error", "not streamed", True),
})
def test_failover_and_cool_down(fault, given, status, code, failover, cools_down, streamed, b, c, pool):
    a, timeouts = FakeOpenAI(text="from a."), {"first_byte_timeout": 0.1 if code == "timeout" else 20}
    server = pool((a.faulting(fault(a)), {"weight": 1000, **timeouts}), b)
    got = chat(server, BOTH, stream=streamed)
    state = ask(server, path="/status").json["controllers"][0]
    assert (state["rests_for_seconds"] > 0) == cools_down and state["in_flight"] == 0
    if failover == "not streamed" and streamed:
        assert text_of(got) == "from " and "error" in sse(got.body)[-1] and not b.bodies()
        return
    if failover:
        assert text_of(got) == "from b." and route_of(got) == f"a={given}, b=200"
        assert len(b.bodies()) == 1 and len(a.bodies()) in (1, 1 + (fault is HANGS_UP))
    else:
        assert (got.status, got.json["error"]) == (status, {"message": "told", "type": "t", "param": "p", "code": "c"})
        assert not b.bodies() and route_of(got) == f"a={status}"
    alone = chat(pool(c.faulting(fault(c)), **timeouts), BOTH, stream=streamed)
    assert (alone.status, alone.json["error"]["code"]) == (status, code), alone.body
    assert code != "upstream_auth" or alone.headers["x-should-retry"] == "false"
    assert alone.headers.get("retry-after") == "7" or status not in (408, 409, 425, 429) and (code, status) != ("c", 503)


def test_all_fail_and_each_is_asked_once_and_the_next_request_is_told_to_come_again(a, b, c, pool):
    server = pool(*(fake.sends(b"\0") for fake in (a, b, c)))
    got = chat(server, BOTH)
    assert (got.status, route_of(got)) == (502, "a=502, b=502, c=502") and [len(fake.bodies()) for fake in (a, b, c)] == [1, 1, 1]
    got = chat(server, BOTH)
    assert (got.status, got.headers["retry-after"]) == (503, "1")


def test_when_all_cool_down_the_soonest_is_told(a, b, pool):
    server = pool(a, b)
    for fake, seconds in ((a, b"3600"), (b, b"40")):
        fake.faults.append(fake.status(429, extra=b"Retry-After: %b\r\n" % seconds))
    for code in ("c", "rate_limit_exceeded"):      # once when they say so, once when they cool down
        got = chat(server, BOTH)
        assert got.status == 429 and got.json["error"]["code"] == code and 38 <= int(got.headers["retry-after"]) <= 40
    assert len(a.bodies()) == len(b.bodies()) == 1


@table({  # (the kind of upstream, its answer to requests for the broken model, does it keep the connection then; None: it says nothing more)
    "an error of Akash": ("akash", STREAM_HEAD + chunks(b'3:"Internal Server Error"\n'), True), "a 5xx": ("openai", reply(500, b"{}"), True),
    "a cut": ("openai", b"", False), "a cut within the head": ("openai", b"HTTP/1.1 200 OK\r\nA", False),
    "a cut within the body": ("openai", reply(200, b'{"id": "c"', chunked=False)[:-2], False), "a cut of Akash": ("akash", STREAM_HEAD + chunk(STEP), False),
    "an early end": ("openai", reply(200, b'{"id": "c"'), True), "an early end of Akash": ("akash", STREAM_HEAD + chunks(STEP), True),
    "an answer that is not JSON": ("openai", reply(200, b"{]"), True), "a malformed line": ("akash", STREAM_HEAD + chunks(b"0:x\n"), True),
    "a firewall's page before Akash": ("akash", reply(403, b"<!DOCTYPE html>", "text/html"), True),
    "silence": ("openai", b"", None), "silence after its head": ("openai", FakeOpenAI.head(), None), "silence of Akash": ("akash", STREAM_HEAD + chunk(STEP), None),
})
def test_a_broken_model_keeps_no_other_model_from_being_served(kind, failed, keeps, pool):
    fakes = [FakeAkash(), FakeAkash()] if kind == "akash" else [FakeOpenAI(), FakeOpenAI()]
    for fake in fakes:
        fake.answer = lambda sock, request, answer=fake.answer: (
            sock.sendall(failed) or (stalled(sock) if keeps is None else keeps) if b'"broken"' in request.body else answer(sock, request))
    server = known(pool(*fakes, first_byte_timeout=0.02 if keeps is None else 20))
    for _ in range(9):
        assert chat(server, BOTH, model="broken").status == (504 if keeps is None else 502)
    assert any(state["rests_for_seconds"] for state in ask(server, path="/status").json["controllers"])
    server.reload(dataclasses.replace(server.settings, first_byte_timeout=20))      # for the other one, however busy the machine is
    assert chat(server, BOTH).status == 200


def test_a_short_cool_down_is_waited_for(a, b, pool, monkeypatch):
    monkeypatch.setattr(akashproxy, "BACKOFF_BASE", 0.3)
    assert statuses(pool(a.sends(b"\0"), b.sends(b"\0"), max_wait=5), 2) == [502, 200], "each is asked at most once in a request"


def test_a_storm_of_429_on_one_of_three_keys_costs_no_error(a, b, c, pool):
    server = pool(a, b.faulting(*[b.status(429, extra=b"Retry-After: 60\r\n")] * 500), c)
    assert set(at_once(lambda: chat(server, BOTH).status, 200)) == {200}
    state = ask(server, path="/status").json["controllers"]
    assert len(b.bodies()) < 20 and sum(one["served"] for one in state) == 200 and state[1]["last_error"] == "429 rate limit"


def test_tiers(a, b, c, pool):
    server = pool((a, {"priority": 2}), (b, {"priority": 1}), (c, {"priority": 1}))
    assert {route_of(chat(server, BOTH)) for _ in range(4)} == {"b=200", "c=200"}
    for fake in (b, c):
        fake.faults.append(fake.status(429, extra=LIMIT))
    assert route_of(chat(server, BOTH)) in ("b=429, c=429, a=200", "c=429, b=429, a=200")
    assert route_of(chat(server, BOTH)) == "a=200"


def test_requests_at_a_time(a, b, pool):
    server = pool((a, {"max_concurrency": 1, "priority": 1}), (b, {"max_concurrency": 1, "priority": 2}), max_wait=0.5)
    request = post("/v1/chat/completions", BOTH)
    for fake in (a, b):
        fake.faults.append(fake.stall())
    with connect(server, request):
        wait_for(a.bodies)
        with connect(server, request) as second:
            wait_for(b.bodies)
            got = chat(server, BOTH)
            assert (got.status, got.headers["retry-after"]) == (429, "1")
            answer = later(chat, server, BOTH)
            second.close()
            assert answer.result().headers["x-akashproxy-route"] == "b=200"


def test_who_can_serve_a_model(pool):
    a, b, c = FakeOpenAI(["gpt-x", "both"]), FakeOpenAI(["llama", "both"]), FakeOpenAI(["secret"])
    server = known(pool(a, b, (c, {"models": ["mini-*", "named"], "model_map": {"alias": "real"}})))
    routes = {model: route_of(chat(server, {**BOTH, "model": model})) for model in ("gpt-x", "llama", "mini-1", "named", "alias")}
    assert routes == {"gpt-x": "a=200", "llama": "b=200", "mini-1": "c=200", "named": "c=200", "alias": "c=200"}
    assert route_of(chat(server, {**BOTH, "model": "unlisted"})) in ("a=200", "b=200"), "it is tried"
    ids = [model["id"] for model in ask(server, path="/v1/models").json["data"]]
    assert ids == ["gpt-x", "both", "llama", "alias", "named"]
    assert ask(server, path="/v1/models/llama").json["owned_by"] == "fake"


def test_a_model_that_nobody_has(a, pool):
    got = chat(known(pool((a, {"models": ["only"]}))), BOTH)
    assert (got.status, got.json["error"]["code"]) == (404, "model_not_found") and not a.bodies()


@pytest.mark.parametrize("fails", [False, True])
def test_lists_are_read_by_one_client_at_a_time(fails, pool, own):
    running, most, goes_on = [], [], threading.Event()

    class Slow(akashproxy.Controller):
        def models(self):
            running.append(self.name)
            most.append(len(running))
            goes_on.wait(20)
            running.pop()
            if fails:
                raise APIError(503, "down")
            return [{"id": "both"}]

    own(Slow)
    server, before = pool((FakeOpenAI(), {"type": "own"})), set(threading.enumerate())
    with crowd(server, 20, head_of("GET", "/v1/models", "Connection: close")) as socks:
        wait_for(lambda: sum(thread.name == "akashproxy worker" for thread in set(threading.enumerate()) - before) == 20 and running)
        goes_on.set()
        assert {receive(sock)[9:12] for sock in socks} == {b"503" if fails else b"200"} and set(most) == {1}
    count = len(most)
    assert ask(server, path="/v1/models").status == (503 if fails else 200) and len(most) == count + 1, "no answer is kept"


def test_the_last_good_list_is_kept_when_one_is_down(pool):
    a, b = FakeOpenAI(["one"]), FakeOpenAI(["two"])
    server = known(pool(a, b, models_ttl=0))
    b.close()
    assert [model["id"] for model in ask(server, path="/v1/models").json["data"]] == ["one", "two"]


def test_tools_never_go_to_akash_if_another_can_take_them(pool):
    a, b = FakeAkash(), FakeOpenAI()
    server = pool((a, {"weight": 1000}), b)
    for _ in range(3):
        assert route_of(chat(server, BOTH, **WITH_A_TOOL)) == "b=200"
    assert not a.bodies() and b.bodies()[0]["tools"] == WITH_A_TOOL["tools"]
    b.faults.append(b.status(429, extra=LIMIT))
    for _ in range(2):
        got = chat(server, BOTH, **WITH_A_TOOL)
        assert (got.status, got.headers["retry-after"]) == (429, "7"), "the 400 of Akash would be a lie, and so would the time of one that can't"
    got = chat(pool(FakeAkash()), BOTH, **WITH_A_TOOL)
    assert (got.status, got.json["error"]["param"]) == (400, "tools")


def test_who_alone_can_do_it_rests_only_where_it_was_told_to(akash, b, pool):
    assert statuses(pool((akash, {"models": ["both"]}), b.sends(b"\0"), max_wait=0), 2, **WITH_A_TOOL) == [502, 200]


def test_akash_beside_a_key(pool):
    a, b = FakeAkash(), FakeOpenAI(["gpt-x"])
    server = known(pool((a, {"priority": 1}), (b, {"priority": 2, "model_map": {CHAT["model"]: "gpt-x"}})))
    assert text_of(chat(server)) == "Hello from the mock."
    a.sends(reply(429, RATE, extra=b"x-tokenlimit-reset: %d\r\n" % RESET), keep=True)
    got = chat(server)
    assert text_of(got) == "Hi there." and route_of(got) == "a=429, b=200"
    assert ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] > 6900
    assert ask(server, path="/images/" + a.name).body == PNG
    assert {"Qwen/Qwen3", "gpt-x"} < {model["id"] for model in ask(server, path="/v1/models").json["data"]}


# What one client's request causes at an upstream stops no other request.


def attempt(pool, *errors, model="m"):
    """Requests one after the other, each with the error that its controller gives (None: a success); the errors of the pool."""
    for error in errors:
        member = pool.acquire(exchange(pool, model))
        pool.release(member, error, error is None, pool.clock(), model)


def outcome(pool, model="m", tried=(), errors=()):
    """What a request meets now: a controller's name, "wait", or the error's status and Retry-After."""
    call = exchange(pool, model)
    call.tried, call.errors = list(tried), list(errors)
    try:
        member = pool.acquire(call)
    except akashproxy.Queued:
        call.close()
        return "wait"
    except APIError as error:
        return error.status, error.retry_after
    pool.release(member, None, False, 0)
    return member.name


@table({
    # name: (errors before, is there a success after them, does the lone controller's limit of 2 s end in 2 s)
    "a refused key": ([AUTH], True), "a refused key, no success": ([AUTH], False), "a spent quota, twice": ([AUTH, AUTH], True),
    "seven 5xx": ([SERVER] * 7, True), "seven 5xx, no success": ([SERVER] * 7, False), "blips": ([NETWORK] * 9, True),
    "blips, no success": ([NETWORK] * 9, False), "all of them": ([NETWORK, AUTH, SERVER] * 3, False),
    "a client's own mistakes": ([stop_of(400), stop_of(404), stop_of(413), stop_of(403, category="refused")] * 5, False),
})
def test_a_limit_ends_when_it_says_whatever_failed_before(before, success):
    pool = members_of({"a": 1}, max_wait=0)
    attempt(pool, *before, *[None] * success)
    if success:
        assert pool.status()[0]["rests_for_seconds"] == 0
    error = stop_of(429, retry_after=2)
    member = pool.acquire(exchange(pool))
    pool.release(member, error, False, pool.clock(), "m")
    assert outcome(pool, tried=[member], errors=[error]) == (429, 2) == outcome(pool)
    pool.clock.now += 2
    assert outcome(pool) == "a"


def test_every_category_has_a_policy_and_a_status_has_a_category():
    assert set(akashproxy.FAILURE_POLICY) == set(Category)
    assert APIError(429, "x").category is Category.RATE_LIMIT and APIError(500, "x").category is Category.SERVER
    with pytest.raises(ValueError):
        APIError(502, "x", category="unknown")


@pytest.mark.parametrize("number", [401, 402, 403])
def test_one_refusal_of_each_key_stops_nobody(number, a, b, c, pool):
    server = pool(a, b, c)
    for fake in (a, b, c):
        fake.faults.append(fake.status(number, b'{"error":{"message":"it is not allowed"}}'))
    refused, *others = statuses(server, 4)
    assert refused >= 400 and others == [200] * 3
    assert sum(each["rests_for_seconds"] == 0 for each in ask(server, path="/status").json["controllers"]) >= 1


def test_when_all_refuse_the_key_the_error_says_so_each_time(pool):
    fakes = [FakeOpenAI() for _ in range(2)]
    server = pool(*fakes)
    for fake in fakes:
        fake.faults.extend([fake.status(401)] * 9)
    for _ in range(4):
        got = chat(server, BOTH)
        assert got.json["error"]["code"] == "upstream_auth" and "key" in got.json["error"]["message"] and "busy" not in got.body.decode()


def test_a_limit_of_one_model_cools_that_model_only():
    pool = members_of({"a": 1, "b": 1}, max_wait=0)
    limit = stop_of(429, retry_after=50, cooldown_scope="model")
    attempt(pool, limit, limit, model="x")
    assert outcome(pool, "x") == (429, 50) and outcome(pool, "y") in ("a", "b") and outcome(pool, "X") in ("a", "b")
    state = pool.status()[0]
    assert (state["rests_for_seconds"], state["models_cooling_down"]) == (0, 1)
    pool.clock.now += 50
    assert outcome(pool, "x") in ("a", "b")
    attempt(pool, None, None, model="x")
    attempt(pool, stop_of(429, cooldown_scope="model"), model="x")
    assert sum(len(member.cooldowns) for member in pool.upstreams) == 1, "and the success has ended the one before"


def test_names_of_models_are_remembered_within_bounds():
    pool = members_of({"a": 1})
    for number in range(2000):
        attempt(pool, stop_of(429, retry_after=50, cooldown_scope="model"), model=f"{number:04}" * 64)
    assert len(pool.upstreams[0].cooldowns) == 256
    assert max(len(model) for _, model in pool.upstreams[0].cooldowns) == 256
    assert "0001" not in json.dumps(pool.status())


def test_a_long_limit_is_checked_now_and_then_by_one_request():
    pool = members_of({"a": 1}, max_wait=0)
    attempt(pool, stop_of(429, retry_after=172800))
    pool.clock.now += 599
    assert outcome(pool) == (429, 172800 - 599)
    pool.clock.now += 1
    assert outcome(pool) == "a" and outcome(pool) == (429, 172800 - 600)
    pool.clock.now += 600
    attempt(pool, None)
    assert outcome(pool) == "a" and pool.status()[0]["rests_for_seconds"] == 0


@table({
    "a limit": (429, b"429 rate limit"), "a 5xx": (500, b"502 server error"), "a refused key": (401, b"the upstream refuses the key"),
    "a mistake": (400, b'"last_error":null'), "an unknown model": (404, b'"last_error":null'), "too large": (413, b'"last_error":null'),
})
def test_status_shows_no_words_of_clients(number, words, a, pool):
    server = pool(a, keys=keys("alice", "bob"))
    secret = "The password of alice is hunter2"
    a.faults.append(a.status(number, {"error": {"message": f"bad prompt: {secret}", "code": "hunter2", "type": "hunter2"}}))
    before = time.time()
    assert chat(server, BOTH, bearer("alice"), messages=[user(secret)]).status >= 400
    state = ask(server, path="/status", headers=bearer("bob"))
    assert b"hunter2" not in state.body and words in state.body
    one = state.json["controllers"][0]
    assert one["failed"] == (b"null" not in words) and (one["last_error"] is None) == (one["last_error_at"] is None)
    if one["last_error_at"]:
        moment = datetime.datetime.strptime(one["last_error_at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
        assert before - 2 < moment.timestamp() < time.time() + 2


def test_a_lone_controller_rests_only_where_it_was_told_to_and_shows_that(a, pool):
    server = pool(a.faulting(a.raw(b"\0"), a.status(401), a.status(402), a.raw(b"\0"), *[a.status(500)] * 7))
    assert statuses(server, 12) == [502, 424, 424, 502, *[502] * 7, 200]
    assert ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] == 0
    assert b'akashproxy_controller_resting{controller="a"} 0' in ask(server, path="/metrics").body
    a.faults.append(a.status(429, extra=b"Retry-After: 99\r\n"))
    for _ in range(2):
        got = chat(server, BOTH)
        assert (got.status, got.headers["retry-after"]) == (429, "99")
    assert len(a.bodies()) == 13


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
def test_our_own_lack_of_resources_is_not_the_upstreams_failure(number, caplog):
    akashproxy.exhaustion_logged_at = -math.inf
    errors = [akashproxy.upstream_error(OSError(getattr(errno, number), "x"), akashproxy.CancelScope(), "b") for _ in range(50)]
    assert {(error.status, error.category, error.headers()["Retry-After"]) for error in errors} == {(503, Category.LOCAL, "1")}
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert akashproxy.upstream_error(OSError(errno.ECONNREFUSED, "x"), akashproxy.CancelScope(), "b").category is Category.NETWORK
    assert akashproxy.upstream_error(socket.gaierror(-2, "x"), akashproxy.CancelScope(), "b").category is Category.NETWORK


def test_a_process_without_descriptors_blames_no_upstream(config, a, b):
    for each in (a, b):
        each.faults.extend([each.stall()] * 50)
    path = config({"controllers": [{"name": name, "base_url": each.url} for name, each in (("a", a), ("b", b))], "max_wait": 0})
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))}
    with started("--config-file", path, popen=limit) as (_, server), link_to(server) as status:
        assert ask_again(status).status == 200      # a connection that is there already
        with crowd(server, 20, b"") as socks:
            assert ask_again(status).status == 200      # they have been let in
            for sock in socks:
                sock.sendall(post("/v1/chat/completions", BOTH))
            wait_for(lambda: len(select.select(socks, [], [], 1)[0]) > 3)
            for sock in select.select(socks, [], [], 0)[0]:
                got = sock.recv(65536)
                assert got.startswith(b"HTTP/1.1 503") and b"Retry-After: 1\r\n" in got and b"out of resources" in got
            for state in ask_again(status, path="/status").json["controllers"]:
                assert (state["failed"], state["rests_for_seconds"], state["last_error"]) == (0, 0, None)


def test_connections_that_cannot_be_accepted_are_one_line_in_the_log():
    resource = pytest.importorskip("resource")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))}
    with started("--demo", before="akashproxy.EventLoop.TICK = 0.02", popen=limit) as (process, server):
        with crowd(server, 60, b""):
            time.sleep(0.1)     # several ticks of its clock
        wait_for(lambda: ask(server).status == 200)
        process.terminate()
        assert process.stderr.read().count("cannot accept a connection") == 1


# -- other names of models, and several models behind one


@pytest.mark.parametrize("asked, model", {"claude-haiku-9": "small", "claude-9": "big/one", "big--one": "big/one", "as--is": "as--is", "no--such": "no--such", "both": "both"}.items())
def test_other_names_of_models(asked, model, pool):
    fake = FakeOpenAI(["big/one", "as--is", "as/is", "small", "both"])
    server = pool(fake, model_aliases={"*haiku*": "small", "claude-*": "big/one"})
    got = chat(server, {**BOTH, "model": asked, "new": 1})
    assert got.status == 200 and fake.bodies()[-1] == {**BOTH, "model": model, "new": 1}
    got = ask(server, "POST", "/v1/messages", {**ASKED, "model": asked})
    assert fake.bodies()[-1]["model"] == model and got.json["model"] == asked, "a client reads the name that it asked for"


def test_aliases_are_a_setting(config):
    for aliases, text in (({"a": "b"}, "a=b"), ({"c-*": "d", "e": "f=g"}, "c-*=d, e=f=g"), ({"a": ["b", "c"], "d": "e"}, "a=b,a=c,d=e")):
        path = config({"model_aliases": aliases})
        assert load(path).model_aliases == Settings.load({"MODEL_ALIASES": text}).model_aliases == aliases
    assert "MODEL_ALIASES=a=b,a=c,d=e\n" in run("--config-file", path, "--check").stdout
    assert "MODEL_ALIASES=c-*=d,e=f" in run("--check", MODEL_ALIASES="c-*=d,e=f").stdout
    for wrong in ([], [""], ["x", 1], 7, {"x": "y"}, None):
        with pytest.raises(ConfigError, match="model_aliases: 'a' must be a model or a list of models"):
            load(config({"model_aliases": {"a": wrong}}))


SMART = {"smart": ["one", "two", "three"]}


@table({   # (fault at a, which alone has the model "one"; who answers with which model, the route); b has "two"
    "the first answers": (None, "one", "a(one)=200"),
    "a limit": (does("status", 429, extra=LIMIT), "two", "a(one)=429, b(two)=200"),
    "cut before the first event": (does("raw", FakeOpenAI.head()), "two", "a(one)=502, b(two)=200"),
    "unknown at its upstream": (does("status", 404), "two", "a(one)=404, b(two)=200"),
    "a server error": (does("status", 500), "two", "a(one)=500, b(two)=200"),
    "too long for it": (does("status", 400, b'{"error":{"message":"m","code":"context_length_exceeded"}}'), "two", "a(one)=400, b(two)=200"),
    "a wrong request": (lambda fake: fake.status(400), None, "a(one)=400"),
})
def test_the_models_of_an_alias_are_tried_in_order(fault, model, route, streamed, a, b, pool, log):
    server = pool((a, {"models": ("one",)}), (b, {"models": ("two",)}), model_aliases=SMART)
    a.faults.extend([fault(a)] if fault else [])
    got = chat(server, BOTH, stream=streamed, model="smart")
    assert route_of(got) == route and got.status == (200 if model else 400)
    if model:
        assert ({"one": a, "two": b}[model]).bodies()[-1]["model"] == model
        answers = sse(got.body) if streamed else [got.json]
        assert {answer["model"] for answer in answers} == {"smart"}
        wait_for(lambda: f"model=smart answered_model={model} " in log.text)


def test_models_of_an_alias_that_rest_or_are_unknown_are_passed_over(a, b, pool):
    server = pool((a.sends(b"\0"), {"models": ("one",)}), (b, {"models": ("two",)}), model_aliases={"smart": ["zero", "one", "two"]}, max_wait=9)
    assert route_of(chat(server, BOTH, model="smart")) == "a(one)=502, b(two)=200"
    assert route_of(chat(server, BOTH, model="smart")) == "b(two)=200", "a model with others after it is not waited for"
    for path, body in {"/v1/messages": ASKED, "/v1/responses": {"input": "hi"}}.items():
        got = ask(server, "POST", path, {**body, "model": "smart"})
        assert got.json["model"] == "smart" and b.bodies()[-1]["model"] == "two"
    assert ask(server, path="/v1/models/smart").json["id"] == "smart"


def test_another_model_of_the_same_controller_is_tried_after_a_limit(a, pool):
    """A 429 may name no model, but most limits are those of one."""
    server = pool(a.faulting(a.status(429, extra=b"Retry-After: 60\r\n")), model_aliases={"smart": ["one", "two"]})
    assert route_of(chat(server, BOTH, model="smart")) == "a(one)=429, a(two)=200"
    assert route_of(chat(server, BOTH, model="smart")) == "a(two)=200", "and the first one is not asked again"
    a.faults.append(a.status(429, extra=b"Retry-After: 70\r\n"))
    for route in ("a(two)=429", ""):
        got = chat(server, BOTH, model="smart")
        assert (got.status, got.headers.get("x-akashproxy-route", "")) == (429, route) and 58 < int(got.headers["retry-after"]) <= 70
    assert [body["model"] for body in a.bodies()] == ["one", "two", "two", "two"]


def test_when_no_model_of_an_alias_can_be_served_the_best_error_is_told(a, b, pool):
    server = pool((a.faulting(a.status(429, extra=LIMIT)), {"models": ("one",)}), (b, {"models": ("two",)}), model_aliases=SMART)
    b.faults.append(b.status(500))
    got = chat(server, BOTH, model="smart")
    assert (got.status, got.headers["retry-after"], route_of(got)) == (429, "7", "a(one)=429, b(two)=500")


def test_an_alias_is_available_again_as_soon_as_one_of_its_models(a, b, pool):
    server = pool((a.faulting(a.status(429, extra=b"Retry-After: 14400\r\n")), {"models": ("one",)}), (b, {"models": ("two",)}), model_aliases=SMART)
    b.faults.append(b.status(429, extra=b"Retry-After: 20\r\n"))
    for _ in range(2):
        got = chat(server, BOTH, model="smart")
        assert got.status == 429 and int(got.headers["retry-after"]) in (19, 20)


def test_a_key_uses_only_its_own_models_of_an_alias(a, b, pool):
    server = pool((a, {"models": ("one",)}), (b, {"models": ("two",)}), model_aliases=SMART, keys=keys("alice", models=("two",)) + keys("bob", models=("x",)))
    assert route_of(chat(server, BOTH, bearer("alice"), model="smart")) == "b=200" and not a.bodies()
    b.faults.append(b.status(500))
    assert chat(server, BOTH, bearer("alice"), model="smart").status == 502 and not a.bodies()
    refused = chat(server, BOTH, bearer("bob"), model="smart")
    assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found") and "one" not in refused.json["error"]["message"].split("'")


def relayed_with(name, data, cut):
    decoder = akashproxy.PassthroughDecoder("up", model=name)
    events = [event for at in range(0, len(data), cut) if not decoder.complete for event in decoder.feed(data[at:at + cut])] + decoder.close()
    return b"".join(event.data for event in events)


@pytest.mark.parametrize("cut", [1, 7, 10 ** 6])
def test_only_the_model_of_a_relayed_answer_is_replaced(cut):
    event = b'data: {"id":"c","model" : "big/one","choices":[{"delta":{"content":"%b"}}]}\n\n'
    quoted = rb'\"model\":\"big/one\" \"model\" : \"big/one\"'
    data = event % quoted + b": ping\n\n" + event % b"x" + b"data: [DONE]\n\n"
    assert relayed_with("", data, cut) == data
    assert relayed_with("a\"b", data, cut) == data.replace(b'"model" : "big/one","c', b'"model":"a\\"b","c')


# -- the same controller for a conversation


def conversations(pool, count):
    return {str(number): pool.acquire(conversation(pool, str(number))).name for number in range(count)}


def conversation(pool, number):
    call = exchange(pool)
    call.conversation = number
    return call


def test_affinity_is_by_weight_and_moves_only_what_must_move():
    pool = members_of({"a": 2, "b": 1, "c": 1}, "affinity")
    before = conversations(pool, 4000)
    counted = collections.Counter(before.values())
    assert conversations(pool, 4000) == before
    assert all(abs(counted[name] - share) < 150 for name, share in {"a": 2000, "b": 1000, "c": 1000}.items()), counted
    pool.upstreams[1].record_result(stop_of(429, retry_after=60), pool.clock(), pool.clock())
    while_b_rests = conversations(pool, 4000)
    assert {before[number] for number in before if while_b_rests[number] != before[number]} == {"b"}
    assert {while_b_rests[number] for number in before if before[number] == "b"} == {"a", "c"}
    pool.clock.now += 61
    assert conversations(pool, 4000) == before
    bigger = conversations(members_of({"a": 2, "b": 1, "c": 1, "d": 4}, "affinity"), 4000)
    assert {bigger[number] for number in before if bigger[number] != before[number]} == {"d"}


FIRST, ANSWER, SECOND = user("a question"), assistant("an answer"), user("another one")


def conversation_of(body, key="", model="m"):
    call = Call({"model": model, **body})
    call.original.body, call.key_name = body, key
    return akashproxy.conversation_of(call)


@table({   # requests of one conversation, as chats; the last one belongs to another
    "it goes on": ({"messages": [FIRST]}, {"messages": [FIRST, ANSWER, SECOND]}, {"messages": [SECOND]}),
    "a string or parts": ({"messages": [FIRST]}, {"messages": [user([{"type": "text", "text": "a question", "cache_control": {"type": "ephemeral"}}])]},
                          {"messages": [user([text_part("a question?")])]}),
    "another system text": ({"messages": [system("s"), FIRST]}, {"messages": [developer("s"), FIRST, ANSWER]}, {"messages": [FIRST]}),
    "a prompt_cache_key": ({"messages": [FIRST], "prompt_cache_key": "k"}, {"messages": [SECOND], "prompt_cache_key": "k"},
                           {"messages": [FIRST], "prompt_cache_key": "l"}),
    "half a character": ({"messages": [user("\ud800")]}, {"messages": [user("\ud800"), ANSWER]}, {"messages": [user("\ud801")]}),
    "a long text": ({"messages": [user("x" * 10 ** 6)]}, {"messages": [user("x" * 10 ** 6), ANSWER]}, {"messages": [user("x" * 999_999)]}),
})
def test_requests_of_one_conversation(case):
    one, later, other = map(conversation_of, case)
    assert one == later == conversation_of(case[0], model="n") and one and one != other
    assert ("prompt_cache_key" in case[0]) == (conversation_of(case[0], "alice") == one), "keys part conversations"


def test_what_is_no_conversation():
    for body in ({}, {"input": "x"}, {"messages": None}, {"messages": [ANSWER, 7]}, {"messages": 7}, {"prompt_cache_key": 7}):
        assert conversation_of(body) == "", body


def test_hashing_a_conversation_takes_no_longer_for_a_long_text():
    assert thread_seconds(conversation_of, {"messages": [user("\u00e9" * (16 << 20))]}) < 0.01


@pytest.mark.parametrize("path", WANTS)
def test_conversations_keep_their_controller_in_all_dialects(path, pool):
    server = pool(FakeOpenAI(), FakeOpenAI(), FakeOpenAI(), pool_type="affinity")

    def route(*texts):
        messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
        body = {"input": messages, "instructions": "s"} if "responses" in path else {"messages": messages, "max_tokens": 9}
        return route_of(ask(server, "POST", path, {"model": "both", **body}))

    routes = {text: route(text) for text in map(str, range(12))}
    assert len(set(routes.values())) == 3
    assert {text: route(text, "an answer", "more") for text in routes} == routes
    keyed = {ask(server, "POST", path, {"model": "both", "input": str(n), "messages": [user(str(n))], "max_tokens": 9, "prompt_cache_key": "k"}).headers[
        "x-akashproxy-route"] for n in range(6)}
    assert len(keyed) == 1


# -- the length of a model's context


@table({     # an entry of a model list: the length of its context
    "Akash's, July": ({"token_limit": 8000}, 8000), "Akash's, 2026": ({"tokenLimit": 128000}, 128000), "OpenRouter": (
        {"context_length": 9, "top_provider": {"context_length": 8, "max_completion_tokens": 7}}, 9),
    "OpenRouter's provider only": ({"top_provider": {"max_completion_tokens": 7, "context_length": 8}}, 8), "vLLM": ({"max_model_len": 32768}, 32768),
    "Groq": ({"context_window": 131072, "max_completion_tokens": 5}, 131072), "Mistral": ({"max_context_length": 7}, 7),
    "GitHub": ({"capabilities": {"limits": {"max_output_tokens": 1, "max_context_window_tokens": 64000, "max_prompt_tokens": 9}}}, 64000),
    "limits": ({"limits": {"max_input_tokens": 5, "max_output_tokens": 4}}, 5), "Gemini": ({"outputTokenLimit": 3, "inputTokenLimit": 1048576}, 1048576),
    "LM Studio": ({"max_context_length": 131072, "loaded_context_length": 4096}, 4096), "LM Studio, not loaded": ({"max_context_length": 131072}, 131072),
    "Hugging Face": ({"providers": [{"provider": "a", "status": "live"}, {"provider": "b", "context_length": 9}]}, 9),
    "a list of numbers": ({"context_length": [4096], "context": [[5]]}, None),
    "models.dev": ({"limit": {"output": 3, "context": 4}}, 4), "nested in two names": ({"context": {"length": 6}}, 6),
    "llama.cpp": ({"meta": {"n_vocab": 1, "n_ctx": 4096}}, 4096), "camel case": ({"contextWindow": 5}, 5), "with dashes": ({"max-context-length": 5}, 5),
    "a string": ({"context_length": "8192"}, 8192), "a float": ({"context_length": 8192.0}, 8192), "the largest": ({"context_length": 2 ** 53 - 1}, 2 ** 53 - 1),
    "context before other names": ({"max_input_tokens": 5, "context_window": 6}, 6), "the next one, if one is wrong": ({"context_length": 0, "max_model_len": 6}, 6),
    "zero": ({"context_length": 0}, None), "negative": ({"context_length": -1}, None), "too large": ({"context_length": 2 ** 53}, None),
    "half": ({"context_length": 0.5}, None), "a Boolean": ({"context_length": True}, None), "words": ({"context_length": "long"}, None),
    "null": ({"context_length": None, "max_model_len": []}, None), "other digits": ({"context_length": "\u0665"}, None), "huge": ({"max_model_len": "9" * 400}, None),
    "of the answer": ({"max_output_tokens": 5, "max_completion_tokens": 6, "output_token_limit": 7, "max_tokens": 8}, None),
    "nothing": ({"id": "m", "name": "context_length"}, None), "deep": (functools.reduce(lambda inner, _: {"x": inner}, range(400), {"context_length": 5}), None),
})
def test_the_length_of_a_context_is_found_in_whatever_name(entry, length, pool):
    assert akashproxy.context_length(entry) == length
    told = {"context_length": length, "max_model_len": length} if length else {}
    fake, other = FakeOpenAI([{"id": "m", **entry}, "alone"]), FakeOpenAI([{"id": "m"}, {"id": "alone", "context_window": 77}])
    server = pool((fake, {"model_map": {"mapped": "m"}}), (other, {"models": ("alone",)}))
    for headers in ({}, {"anthropic-version": "2023-06-01"}):
        models = {model["id"]: model for model in ask(server, path="/v1/models", headers=headers).json["data"]}
        models["one"] = ask(server, path="/v1/models/m", headers=headers).json
        for name in ("m", "mapped", "one"):
            assert {field: value for field, value in models[name].items() if field in ("context_length", "max_model_len")} == told, name
        assert models["alone"]["context_length"] == 77, "the other controller tells it"


ADA = [user("My name is Ada. " * 1000), assistant("Hello, Ada."), user("What is my name?")]     # 4,000 tokens by our estimate


@table({     # (the model's entry, the messages, is it cut)
    "a short limit": ({"token_limit": 4000}, ADA, "about 4008 tokens > 3000"), "another name": ({"tokenLimit": 4000}, ADA, "about 4008 tokens > 3000"),
    "it just fits": ({"tokenLimit": 5008}, ADA, None), "one token too long": ({"tokenLimit": 5007}, ADA, "about 4008 tokens > 4007"),
    "no limit": ({}, ADA, None), "no limit, very long": ({}, [user("Ada " * 130_000)], "about 130001 tokens > 127000"),
    "system text counts": ({"tokenLimit": 4000}, [system("x " * 7000), user("hi")], "about 3501 tokens > 3000"),
    "pictures do not": ({"tokenLimit": 4000}, [user([picture("data:image/png;base64," + "A" * 50_000)])], None),
})
def test_a_conversation_that_akash_would_cut(entry, messages, cut, streamed, akash, serve):
    akash.models = [{"id": "Qwen/Qwen3", **entry}]
    got = chat(serve(), {"model": "Qwen/Qwen3", "messages": messages}, stream=streamed)
    assert got.status == 200 and got.headers.get("x-akashproxy-context-overflow") == cut
    if streamed:
        return
    server, asked = serve(context_overflow="refuse"), len(akash.bodies())
    got = chat(server, {"model": "Qwen/Qwen3", "messages": messages})
    assert (got.status, len(akash.bodies()) - asked) == ((400, 0) if cut else (200, 1))
    if cut:
        assert (got.json["error"]["code"], got.json["error"]["param"]) == ("context_length_exceeded", "messages")
        tokens, room = re.findall("[0-9]+", cut)
        assert f"maximum context length is {int(room) + 1000} tokens" in got.json["error"]["message"]
        assert f"have about {tokens} tokens" in got.json["error"]["message"]
        got = ask(server, "POST", "/v1/messages", {"model": "Qwen/Qwen3", "messages": [user("Ada " * 200_000)], "max_tokens": 9})
        assert got.status == 400 and got.json["error"]["message"].startswith("prompt is too long: 200001 tokens > ")


def test_a_controller_refuses_or_another_one_has_room(akash, fake, pool, config):
    other = fake
    akash.models = [{"id": "both", "token_limit": 3000}]
    server = pool((akash, {"context_overflow": "refuse"}), (other, {"priority": 2}))
    assert route_of(chat(server, {"model": "both", "messages": ADA})) == "a=400, b=200" and not akash.bodies()
    server = pool((akash, {"context_overflow": "warn"}), context_overflow="refuse")
    assert chat(server, {"model": "both", "messages": ADA}).headers["x-akashproxy-context-overflow"] == "about 4008 tokens > 2000"
    with pytest.raises(ConfigError, match="context_overflow: 'no' is not one of warn, refuse"):
        load(config({"controllers": [{"type": "akash", "context_overflow": "no"}]}))


def test_no_list_of_models_is_no_reason_to_fail(akash, serve):
    akash.models = []
    got = chat(serve(), {"model": "m", "messages": ADA})
    assert got.status == 200 and "x-akashproxy-context-overflow" not in got.headers


# -- near names of an unknown model


@table({    # (asked for, the models a key may use, what is suggested)
    "a typo": ("gpt-4o-mimi", ["gpt-4o-mini", "llama3.2"], "'gpt-4o-mini'"),
    "the case": ("LLAMA3.2", ["gpt-4o-mini", "llama3.2"], "'llama3.2'"),
    "up to three": ("qwen3-80b", ["qwen3-8b", "qwen3-32b", "qwen3-80", "qwen3-800b", "x"], "'qwen3-800b' or 'qwen3-8b' or 'qwen3-80'"),
    "none": ("zzz", ["gpt-4o-mini"], ""),
    "no models": ("zzz", [], ""),
})
def test_near_names(asked, names, expected):
    assert akashproxy.similar_to(asked, names, 3) == expected


@pytest.mark.parametrize("names, asked", [
    ([f"model-{number:06}" for number in range(10_000)], "model-123456"), (["a" * 250] * 10_000, "a" * 256),
    ([f"{'ab' * 28}{number:05}" for number in range(10_000)], "ab" * 128), ([f"{'a' * 50}{'b' * (number % 14)}" for number in range(10_000)], "ab" * 32),
], ids=["many", "long", "alternating", "nested"])
def test_looking_for_near_names_is_bounded(names, asked):
    assert thread_seconds(lambda names: akashproxy.similar_to(asked, names, 3), names) < 0.5


def test_an_unknown_models_error_says_what_there_is(pool, serve, akash):
    fake = FakeOpenAI(["gpt-4o", "gpt-4o-dear"])
    server = pool((fake, {"models": ("gpt-*",)}), keys=keys("alice", models=("gpt-4o", "gpt-4")) + keys("bob"),
                  model_aliases={"gpt-4p": "gpt-4", "*x*": "gpt-4o"})
    fake.faults.extend([fake.status(404, b'{"error":{"message":"no such model","code":"model_not_found"}}')] * 2)
    for key, near in (("alice", "'gpt-4p' or 'gpt-4o'"), ("bob", "'gpt-4p' or 'gpt-4o' or 'gpt-4o-dear'")):
        error = chat(server, BOTH, bearer(key), model={"alice": "gpt-4", "bob": "gpt-4-dea"}[key]).json["error"]
        assert error["message"].startswith("a: no such model. /v1/models lists the available models. Did you mean "), error
        assert set(re.findall("'[^']*'", error["message"])) <= set(re.findall("'[^']*'", near)) and "'gpt-4o" in error["message"]
    assert "Did you mean 'gpt-4o'" in ask(server, path="/v1/models/gpt-4o-", headers=bearer("alice")).json["error"]["message"]
    unknown = STREAM_HEAD + chunks(UNKNOWN)
    akash.sends(unknown, keep=True)
    got = chat(serve(), model="Qwen/Qwen-3").json
    assert got["data"]["msg"] == "Error Model." and got["error"]["message"].endswith("/v1/models lists the available models. Did you mean 'Qwen/Qwen3'?")
    fake.faults.append(fake.status(404, b'{"error":{"message":"The model gpt-4o is gone"}}'))
    assert chat(server, BOTH, bearer("bob"), model="gpt-4o").json["error"]["message"] == "a: The model gpt-4o is gone", "it is listed"


# -- waiting for a controller that is full


def waiting(pool, count, model="m"):
    """Calls that wait, and a list to which each is added when it is woken."""
    woken, calls = [], []
    for _ in range(count):
        call = exchange(pool, model)
        call.resume = functools.partial(woken.append, call)
        with pytest.raises(akashproxy.Queued):
            pool.acquire(call)
        calls.append(call)
    return calls, woken


def test_the_queue_is_first_come_first_served():
    pool = members_of({"a": 1}, max_concurrency=2)
    running = [pool.acquire(exchange(pool)) for _ in range(2)]
    calls, woken = waiting(pool, 5)
    pool.release(running[0], None, True, 0)
    assert woken == calls[:1], "only as many as can go"
    assert outcome(pool) == "wait", "and nobody overtakes it"
    member = pool.acquire(calls[0])
    pool.release(member, None, True, 0)
    pool.release(running[1], None, True, 0)
    assert woken == calls[:3] and member.in_flight == 2
    for call in calls[1:3]:
        pool.release(pool.acquire(call), None, True, 0)
    assert woken == calls and member.in_flight == 2


def test_a_call_that_is_cancelled_leaves_the_queue():
    pool = members_of({"a": 1}, max_concurrency=1)
    running = pool.acquire(exchange(pool))
    calls, woken = waiting(pool, 4)
    calls[0].cancellation.cancel()       # still waiting
    assert woken == calls[:1]
    pool.release(running, None, True, 0)
    calls[1].cancellation.cancel()       # it has just been given the controller
    assert woken == calls[:2]
    for call in calls[:2]:
        with pytest.raises(akashproxy.ClientDisconnected):
            pool.acquire(call)
        call.close()
    assert woken == calls[:3] and running.in_flight == 1
    for call in calls[2:]:
        call.close()
    assert running.in_flight == 0 and not pool.queue.lines


def test_who_has_waited_long_enough_gets_an_error():
    pool = members_of({"a": 1}, max_concurrency=1)
    pool.acquire(exchange(pool))
    calls, woken = waiting(pool, 100)
    pool.clock.now += 2.9
    assert not pool.resume_waiters(32) and not woken
    pool.clock.now += 0.2
    assert pool.resume_waiters(32) and woken == calls[:32]
    while pool.resume_waiters(32):
        pass
    assert woken == calls
    for call in calls:
        error = error_of(APIError, pool.acquire, call)
        assert (error.status, error.retry_after) == (429, 1)


def test_those_who_wait_go_on_after_a_reload():
    before = members_of({"a": 1}, max_concurrency=1)
    running = before.acquire(exchange(before))
    calls, woken = waiting(before, 3)
    options = dataclasses.replace(before.upstreams[0].options, api_key="new")
    after = akashproxy.Pool(dataclasses.replace(before.settings, controllers=(options,)), before, clock=before.clock)
    before.release(running, None, True, 0)
    assert woken == calls[:1] and before.acquire(calls[0]) is running is not after.upstreams[0]
    after.clock.now += 4
    assert not after.resume_waiters(32) and woken == calls


def test_a_cool_down_that_ends_wakes_whom_it_can():
    pool = members_of({"a": 1}, max_concurrency=2)
    attempt(pool, stop_of(429, retry_after=2))
    calls, woken = waiting(pool, 3)
    pool.clock.now += 2
    assert not pool.resume_waiters(32) and woken == calls[:2]


def test_a_crowd_at_a_full_controller_costs_in_proportion_and_no_threads(a, pool):
    server = pool((a.faulting(a.stall()), {"max_concurrency": 1}), max_wait=0.5, first_byte_timeout=60)
    with crowd(server, 1):
        wait_for(a.bodies)
        spent = {}
        for count in (100, 400):
            threads, began = threading.active_count(), time.process_time()
            with crowd(server, count) as socks:
                assert ask(server).status == 200 and threading.active_count() < threads + 10 + akashproxy.WorkerPool.MAX_IDLE
                assert {sock.recv(65536)[:12] for sock in socks} == {b"HTTP/1.1 429"}
            spent[count] = time.process_time() - began
    assert spent[400] < 10 * spent[100] + 0.2, spent


def test_those_who_wait_are_served_in_turn_and_those_who_leave_are_skipped(a, pool):
    server, go = pool((a, {"max_concurrency": 1}), max_wait=30, first_byte_timeout=60), threading.Event()
    a.faults.append(lambda sock, request: go.wait(30) and a.answer(sock, request))
    with crowd(server, 40) as socks:
        wait_for(a.bodies)
        for sock in socks[20:]:
            sock.close()
        wait_for(lambda: samples(server)["akashproxy_open_connections",] == 21)     # with that which asks
        go.set()
        assert {sock.recv(65536)[:12] for sock in socks[:20]} == {b"HTTP/1.1 200"}
    assert len(a.bodies()) == 20 and ask(server, path="/status").json["controllers"][0]["in_flight"] == 0


def test_a_controller_of_ones_own_is_waited_for_without_a_thread(serve, own):
    go = threading.Event()
    own(type("Held", (akashproxy.Controller,), {"events": lambda self, call: go.wait(20) and iter([Text("x"), Finish("stop")])}))
    server = serve(controllers=(akashproxy.ControllerSettings(type="own", max_concurrency=1),), max_wait=20)
    threads = threading.active_count()
    with crowd(server, 6) as socks:
        wait_for(lambda: samples(server)["akashproxy_requests_in_flight",] == 6)
        wait_for(lambda: threading.active_count() - server.workers.idle <= threads + 2)
        go.set()
        assert {sock.recv(65536)[:12] for sock in socks} == {b"HTTP/1.1 200"}


def test_a_server_that_stops_lets_go_of_those_who_wait(a, pool):
    server = pool((a.faulting(a.stall()), {"max_concurrency": 1}), max_wait=60, first_byte_timeout=60)
    with crowd(server, 10) as socks:
        wait_for(a.bodies)
        server.stop(0)
        assert all(sock.recv(65536)[:12] == b"HTTP/1.1 503" for sock in socks)


def test_what_one_cannot_do_costs_it_no_turn(pool):
    a, b = FakeAkash(), FakeOpenAI([CHAT["model"]])
    server = known(pool(a, b))
    for _ in range(10):
        assert route_of(chat(server, **WITH_A_TOOL)) == "b=200"
        chat(server)
    assert len(a.bodies()) >= 5, "the plain chats are shared"


def test_the_next_one_is_waited_for_after_a_silent_one(a, b, pool, monkeypatch):
    monkeypatch.setattr(akashproxy, "BACKOFF_BASE", 0.3)
    server = pool((a.faulting(a.status(500), a.stall()), {"weight": 1000, "first_byte_timeout": 0.1}), b.sends(b"\0"), max_wait=5)
    assert chat(server, BOTH).status in (502, 503)      # b rests for a while
    assert text_of(chat(server, BOTH)) == "from b."


def test_a_second_try_has_a_deadline_too(a, pool):
    server = pool(a, first_byte_timeout=0.2)
    assert chat(server, BOTH).status == 200
    a.faults.extend([a.refuse(), a.stall()])
    assert chat(server, BOTH).status == 504


def test_an_error_after_half_an_event_is_an_event_of_its_own(a, pool):
    first, second = list(a.events())[:2]
    server = pool(a)
    for cut_at in range(0, len(second)):
        a.sends(a.head() + chunk(first) + chunk(second[:cut_at]))
        events = [event for event in chat(server, BOTH, stream=True).body.split(b"\n\n") if event]
        assert events[-1] == b"data: [DONE]" and json.loads(events[-2][6:])["error"]["message"] == "a: connection lost: it broke off its answer.", cut_at
        for event in events[:-1]:
            json.loads(event[6:])


@pytest.mark.parametrize("then", ["cut", "open"])
def test_done_is_the_end_whatever_follows(then, a, pool):
    server = pool(a.faulting(a.raw(a.begun(None)) if then == "cut" else a.stall(99)), idle_timeout=20)
    assert chat(server, BOTH, stream=True).body == b"".join(a.events())
    assert ask(server, path="/status").json["controllers"][0]["failed"] == 0


def test_a_client_that_is_slow_token_by_token_is_not_the_upstreams_silence(pool):
    a = FakeOpenAI(text=("word" * 7000 + " ") * 400)    # each fits a read, all of them not into the buffers on the way
    server = pool(a, idle_timeout=0.3)
    a.faults.append(lambda sock, request: Paced(sock, server).sendall(a.head() + chunks(*a.events())))
    with lazy_stream(server, "Connection: close") as sock:
        due = [handler.request.relay.scope.deadline for handler in server.connections.copy()]
        got = receive(sock)
    assert due == [math.inf]
    assert got.count(b"word" * 7000) == 400 and b"[DONE]" in got and b'"error"' not in got


@pytest.mark.parametrize("number", [405, 501, 415, 406])
def test_what_a_path_can_not_do_is_no_illness(number, a, pool):
    server = pool(a.faulting(*[a.status(number)] * 5))
    assert {ask(server, "POST", "/v1/embeddings", {"model": "both"}).status for _ in range(5)} == {number}
    assert ask(server, path="/status").json["controllers"][0]["failed"] == 0


def test_what_only_the_upstream_understands_is_relayed(a, pool):
    server = pool(a)
    for prompt in (["a", "b"], [1, 2, 3], [[1, 2]]):
        assert ask(server, "POST", "/v1/completions", {"model": "both", "prompt": prompt}).status == 200
        assert a.bodies()[-1]["prompt"] == prompt
    for body in ({"prompt": "x", "stream": True}, {"prompt": "x", "n": 11}, {"prompt": "x", "response_format": "webp"}):
        got = ask(server, "POST", "/v1/images/generations", body)
        assert got.status == 404 and a.bodies()[-1] == body, "this fake has no such path, but was asked"
    only_chat = pool((a, {"paths": ["/v1/chat/completions"]}))
    assert ask(only_chat, "POST", "/v1/images/generations", {"prompt": "x"}).status == 404
    assert ask(only_chat, "POST", "/v1/completions", {"model": "both", "prompt": ["a", "b"]}).status == 400


def test_statuses_queries_and_empty_bodies_of_a_relay(a, pool):
    server = pool(a, FakeOpenAI())
    a.faults.extend([a.raw(b"HTTP/1.1 204 No Content\r\n\r\n"), a.raw(reply(201, b"{}")), a.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")])
    got = [ask(server, "POST", "/v1/x/cancel?a=b", {"model": "both"}, {"OpenAI-Beta": "z", "X-Other": "y"})
           for _ in range(6) if len(a.requests) < 3 or a.faults]
    assert {one.status for one in got} <= {204, 201, 200, 404}
    request = next(request for request in a.requests if "cancel" in request.path)
    assert request.path == "/v1/x/cancel?a=b" and request.headers["openai-beta"] == "z" and "x-other" not in request.headers


def test_a_status_of_an_upstream_costs_the_client_no_connection(fake, pool):
    with link_to(pool(fake)) as link:
        fake.faults.append(fake.status(413))
        assert ask_again(link, "POST", "/v1/chat/completions", BOTH).status == 413
        first = link.sock
        assert first and ask_again(link, "POST", "/v1/chat/completions", BOTH).status == 200 and link.sock is first


def test_a_client_that_leaves_while_all_rest(a, b, pool):
    server = pool(a, b, max_wait=60)
    for fake in (a, b):
        fake.faults.append(fake.status(429, extra=b"Retry-After: 50\r\n"))
    assert chat(server, BOTH).status == 429
    with connect(server, post("/v1/chat/completions", BOTH)):
        wait_for(lambda: len(server.connections) == 1 and any(h.request for h in server.connections))
    wait_for(lambda: not server.connections)


# == controllers: what upstreams' errors mean =================================================


def err(message, **more):
    return {"error": {"message": message, **more}}


def anthropic(kind, message):
    return {"type": "error", "error": {"type": kind, "message": message}}


def google(code, status, message, *details):
    return [{"error": {"code": code, "message": message, "status": status, "details": list(details)}}]


INCORRECT = "Incorrect API key provided: sk-proj-********MxYA. You can find your API key at https://platform.openai.com."
QUOTA = "You exceeded your current quota, please check your plan and billing details."
NO_ACCESS = "Project `proj_x` does not have access to model `both`"
AFFORD = "This request requires more credits, or fewer max_tokens. You requested up to 64000 tokens, but can only afford 512."
LEFT = "Rate limit reached for model `both` in organization `org_x` on tokens per minute (TPM): Limit 6000, Used 5034. Please try again in 7.66s."
BIG = "Request too large for model `both` on tokens per minute (TPM): Limit 6000, Requested 14368, please reduce your message size."
VLLM = "at most 0 image(s) may be provided: both is not a multimodal model"
CAPS = 'litellm.BadRequestError: Hosted_vllmException - {"error":{"message":"%s","type":"BadRequestError","code":400}}. Received Model Group=both' % VLLM
RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
BAD_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com"}
PER_MODEL = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaDimensions": {"model": "both"}}]}
CF_PAGE = b"<!DOCTYPE html><html><head><title>Attention Required! | Cloudflare</title></head><body>Sorry, you have been blocked</body></html>"
SOON = time.time() + 1000
# What an error means: (kind, status, code, retry_after, words, scope)
key_refused = lambda words, *scope: ("auth", 424, "upstream_auth", None, words, *scope)
limited = lambda retry_after, words, *scope: ("limit", 429, "rate_limit_exceeded", retry_after, words, *scope)
failed = lambda status, words: ("server", status, "upstream_error", None, words)
refused_with = lambda status, words: ("refused", status, None, None, words)
wrong = lambda status, words: ("request", status, None, None, words)


@table({
    # name: (status, body, headers) -> (kind, status, code, retry_after, words, scope)
    # -- our key is bad, or its quota is spent
    "OpenAI's wrong key": ((401, err(INCORRECT, type="invalid_request_error", code="invalid_api_key")), key_refused("up: the upstream refuses this server's key (401): Incorrect API key")),
    "OpenAI's restricted key": ((401, err("You have insufficient permissions for this operation. Missing scopes: model.request.")), key_refused("scopes")),
    "OpenAI's spent quota": ((429, err(QUOTA, type="insufficient_quota", code="insufficient_quota")), key_refused("up: the quota of this server's key is spent: You")),
    "OpenAI's hard limit": ((400, err("Billing hard limit has been reached.", code="billing_hard_limit_reached")), key_refused("spent")),
    "OpenAI's closed account": ((403, err("Your account is not active.", code="account_deactivated")), key_refused("not active")),
    "OpenAI's countries": ((403, err("Country, region, or territory not supported", code="unsupported_country_region_territory", type="request_forbidden")), key_refused("refuses this server's key (403)")),
    "Google's wrong key": ((400, google(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", BAD_KEY)), key_refused("API key not valid")),
    "Google's wrong key, not in a list": ((400, google(400, "INVALID_ARGUMENT", "Request refused.", BAD_KEY)[0]), key_refused("Request refused")),
    "Google's key in a text": ((400, err(json.dumps(google(400, "INVALID_ARGUMENT", "API key not valid.", BAD_KEY)[0]), code=400, status="Bad Request")), key_refused(": API key not valid.")),
    "Google's leaked key": ((403, google(403, "PERMISSION_DENIED", "Your API key was reported as leaked. Please use another API key.")), key_refused("leaked")),
    "Google without a key": ((403, google(403, "PERMISSION_DENIED", "Method doesn't allow unregistered callers.")), key_refused("callers")),
    "Google's places": ((400, google(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")), key_refused("location")),
    "OpenRouter's wrong key": ((401, err("No auth credentials found", code=401)), key_refused("credentials")),
    "OpenRouter without credits": ((402, err("Insufficient credits. Add more using https://openrouter.ai/credits", code=402)), key_refused("spent")),
    "OpenRouter's limit of a key": ((403, err("Key limit exceeded (total limit).", code=403)), key_refused("spent")),
    "Anthropic's wrong key": ((401, anthropic("authentication_error", "invalid x-api-key")), key_refused("invalid x-api-key")),
    "Anthropic's balance": ((400, anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API.")), key_refused("spent")),
    "Anthropic's billing": ((402, anthropic("billing_error", "There is an issue with your payment information.")), key_refused("spent")),
    "DeepSeek's balance": ((402, err("Insufficient Balance", type="unknown_error", code="invalid_request_error")), key_refused("spent: Insufficient")),
    "DeepSeek's wrong key": ((401, err("Authentication Fails, Your api key: ****f19c is invalid", type="authentication_error")), key_refused("key: *** is")),
    "Groq's wrong key": ((401, err("Invalid API Key", type="invalid_request_error", code="invalid_api_key")), key_refused("Invalid API Key")),
    "Groq's spending limit": ((400, err("Organization spend limit reached", code="spend_limit_reached")), key_refused("spend limit")),
    "Google's key for another API": ((403, {"error": {"code": 403, "message": "Requests to this API method are blocked.", "details": [
        {**BAD_KEY, "reason": "API_KEY_SERVICE_BLOCKED"}]}}), key_refused("blocked")),
    "Google's suspended consumer": ((403, {"error": {"code": 403, "message": "Consumer 'api_key:x' has been suspended.", "details": [
        {**BAD_KEY, "reason": "CONSUMER_SUSPENDED"}]}}), key_refused("suspended")),
    "xAI's monthly limit": ((429, {"code": "Some resource has been exhausted", "error": "Your team has either used all available credits or reached its "
        "monthly spending limit."}), key_refused("credits")),
    "Alibaba's arrears": ((400, err("Access denied, please make sure your account is in good standing.", code="Arrearage")),
                          key_refused("good standing")),
    "NVIDIA's wrong key": ((403, {"status": 403, "title": "Forbidden", "detail": "Authorization failed"}), key_refused("failed")),
    "Anthropic's usage limit": ((400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will "
        "regain access on 2099-12-01 at 00:00 UTC.")), key_refused("spent")),
    "Anthropic's disabled organization": ((400, anthropic("invalid_request_error", "This organization has been disabled.")), key_refused("disabled")),
    "Azure's private endpoint": ((403, err("Public access is disabled. Please configure private endpoint.", code="403")), key_refused("private")),
    "new-api's quota": ((403, err("预扣费额度失败, 用户剩余额度: ＄0.00", type="new_api_error")), key_refused("spent")),
    "Bedrock's wrong token": ((403, {"Message": "The security token included in the request is invalid."}), key_refused("token")),
    "One API's banned user": ((403, err("用户已被封禁")), key_refused("封禁")),
    "Groq's restricted organization": ((400, err("Organization has been restricted.", code="organization_restricted")), key_refused("restricted")),
    "Mistral's wrong key": ((401, {"message": "Unauthorized", "request_id": "9"}), key_refused("(401): Unauthorized")),
    "Mistral's other one": ((401, {"detail": "Unauthorized"}), key_refused("(401): Unauthorized")),
    "xAI's wrong key": ((400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: xa***ab."}), key_refused("provided: ***")),
    "xAI's credits": ((403, {"code": "x", "error": "Your team has either used all available credits or reached its monthly spending limit."}), key_refused("spent")),
    "Together's wrong key": ((401, err("Invalid API key provided. You can find your API key at https://api.together.xyz.", code="invalid_api_key")), key_refused("Invalid")),
    "Fireworks' suspension": ((412, err("Account x is suspended, possibly due to reaching the monthly spending limit")), key_refused("suspended")),
    "Azure's wrong key": ((401, err("Access denied due to invalid subscription key or wrong API endpoint.", code="401")), key_refused("subscription key")),
    "Cerebras' wrong key": ((401, {"message": "Wrong API Key", "type": "invalid_request_error", "param": "api_key", "code": "wrong_api_key"}), key_refused("Wrong")),
    "Zhipu's balance": ((429, err("余额不足或无可用资源包,请充值。", code="1113")), key_refused("spent: 余额不足")),
    "MiniMax' balance": ((429, err("insufficient balance (1008)", type="insufficient_balance_error", http_code="429")), key_refused("spent")),
    "LiteLLM's unknown key": ((401, err("Authentication Error, Invalid proxy server token passed. Received API Key = sk-...8aSP", type="token_not_found_in_db", param="key", code="401")), key_refused("Key = ***")),
    "LiteLLM's budget": ((400, err("Budget has been exceeded! Current cost: 76.16, Max budget: 10.0", type="budget_exceeded", code="400")), key_refused("spent")),
    "LiteLLM's own wrong key": ((401, err("litellm.AuthenticationError: AuthenticationError: OpenAIException - " + INCORRECT, code="401")), key_refused("(401): Incorrect API key provided: ***", "model")),
    "OpenAI's archived project": ((403, err("The project you are requesting has been archived and is no longer accessible", code="project_archived")), key_refused("archived")),
    "Google's denied project": ((403, google(403, "PERMISSION_DENIED", "Your project has been denied access. Please contact support.")), key_refused("denied")),
    "Google's free tier": ((400, google(400, "FAILED_PRECONDITION", "Gemini API free tier is not available in your country. Please enable billing.")), key_refused("free tier")),
    "Anthropic's scopes": ((403, anthropic("permission_error", "OAuth token does not meet scope requirement user:inference")), key_refused("scope")),
    "Groq's blocked access": ((400, err("API access is blocked.", code="blocked_api_access")), key_refused("spent")),
    "xAI's team by its ID": ((429, {"code": "x", "error": "Your team 12ab-34 has either used all available credits or reached its monthly spending limit."}), key_refused("spent")),
    "DeepInfra without payment": ((402, {"detail": {"error": "inference prohibited, please enter a payment method or top up"}}), key_refused("spent")),
    "Novita's balance": ((403, {"code": 403, "reason": "NOT_ENOUGH_BALANCE", "message": "refused"}), key_refused("spent")),
    "a plain 401": ((401, b"Unauthorized"), key_refused("(401): Unauthorized")),
    # -- this request is refused, others are not
    "OpenRouter's tokens": ((402, err(AFFORD, code=402)), refused_with(402, AFFORD)),
    "OpenRouter's moderation": ((403, err("This model requires moderation on x. Your input was flagged", code=403, metadata={"reasons": ["violence"], "flagged_input": "..."})), refused_with(403, "flagged")),
    "OpenAI's project": ((403, err(NO_ACCESS, type="invalid_request_error", code="model_not_found")), ("refused", 403, "model_not_found", None, NO_ACCESS)),
    "OpenAI's verification": ((403, err("Your organization must be verified to use the model `both`.", code=None)), refused_with(403, "verified")),
    "OpenAI's large request": ((429, err("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 342389.", type="tokens", code="rate_limit_exceeded")), ("refused", 429, "rate_limit_exceeded", None, "too large")),
    "Groq's large request": ((413, err(BIG, type="tokens", code="rate_limit_exceeded")), ("refused", 413, "rate_limit_exceeded", None, "too large")),
    "Anthropic's permission": ((403, anthropic("permission_error", "Your account does not have access to this beta.")), refused_with(403, "beta")),
    "a firewall's page": ((403, CF_PAGE), ("refused", 403, "upstream_blocked", None, "up: It answered with a web page: Attention Required! | Cloudflare.")),
    "LiteLLM's models of a key": ((403, err("key not allowed to access model. This key can only access models=['a']. Tried to access both", type="key_model_access_denied", param="model", code="403")), refused_with(403, "not allowed")),
    "a bare 403": ((403, b""), refused_with(403, "status 403")),
    "401 for a flagged prompt": ((401, err("The prompt was flagged by our safety system.")), refused_with(403, "flagged")),
    "a deny-listed token": ((498, {"message": "blocked output: this generation was blocked"}), refused_with(403, "blocked")),
    "the provider's terms": ((403, err("The request breaks the provider's Terms Of Service, and its API key stays valid")), refused_with(403, "Terms")),
    # -- an unknown model
    "Novita's unknown model": ((400, {"code": 400, "reason": "MODEL_NOT_AVAILABLE", "message": "refused"}), ("model", 404, "model_not_found", None, "refused")),
    "Cloudflare's unknown model": ((400, {"success": False, "errors": [{"code": 5007, "message": "AiError: No such model @cf/x or task"}]}), ("model", 404, "model_not_found", None, "No such model")),
    "401 for a model": ((401, err("Model both is not supported")), ("model", 404, "model_not_found", None, "up: Model both is not")),
    "401 of LiteLLM for a model": ((401, err("key not allowed to access model.", type="key_model_access_denied", code="401")), ("model", 404, "model_not_found", None, "not allowed")),
    "OpenAI's unknown model": ((404, err("The model `both` does not exist or you do not have access to it.", code="model_not_found")), ("model", 404, "model_not_found", None, "does not exist")),
    "DeepSeek's unknown model": ((400, err("Model Not Exist", type="invalid_request_error", code="invalid_request_error")), ("model", 404, "invalid_request_error", None, "Not Exist")),
    "OpenRouter's unknown model": ((400, err("both is not a valid model ID", code=400)), ("model", 404, "model_not_found", None, "valid")),
    "Azure's unknown deployment": ((404, err("The API deployment for this resource does not exist.", code="DeploymentNotFound")), ("model", 404, "DeploymentNotFound", None, "deployment")),
    "Groq's former model": ((400, err("The model `both` has been decommissioned and is no longer supported.", code="model_decommissioned")), ("model", 404, "model_decommissioned", None, "up: The model")),
    "Groq's terms of a model": ((400, err("The model `both` requires terms acceptance.", code="model_terms_required")), ("model", 404, "model_terms_required", None, "terms")),
    "Bedrock's unknown model": ((400, {"message": "The provided model identifier is invalid."}), ("model", 404, "model_not_found", None, "identifier")),
    "Zhipu's unknown model": ((400, err("模型不存在，请检查模型代码。", code="1211")), ("model", 404, "1211", None, "模型不存在")),
    "LiteLLM's unknown model": ((400, err("/chat/completions: Invalid model name passed in model=both. Call `/v1/models` to view available models", code="400")), ("model", 404, "model_not_found", None, "Invalid model")),
    "new-api's unknown model": ((503, err("No available channel for model both", code="model_not_found")), ("model", 404, "model_not_found", None, "channel")),
    "Go's unknown path": ((404, b"404 page not found"), ("model", 404, "model_not_found", None, "up: 404 page not found")),
    # -- a limit
    "OpenAI's limit": ((429, err("Rate limit reached for gpt-4o in organization org-x. Please try again in 20s.", code="rate_limit_exceeded")), limited(20.0, "up: Rate limit", "model")),
    "OpenAI's limit of an organization": ((429, err("Rate limit reached for organization org-x.", code="rate_limit_exceeded"), {"retry-after-ms": "2500"}), limited(2.5, "up: Rate limit")),
    "Baidu's limit": ((429, err("Rate limit reached for RPM", code="rpm_rate_limit_exceeded")), ("limit", 429, "rpm_rate_limit_exceeded", None, "RPM")),
    "Groq's limit": ((429, err(LEFT, type="tokens", code="rate_limit_exceeded")), limited(7.66, "TPM", "model")),
    "Groq's capacity": ((498, err("Flex tier capacity exceeded", code="capacity_exceeded")), ("limit", 429, "capacity_exceeded", None, "capacity")),
    "GitHub's limit": ((429, err("Rate limit of 50 per 86400s exceeded for UserByModelByDay. Please wait 3000 seconds before retrying.", code="RateLimitReached")),
                       ("limit", 429, "RateLimitReached", 3000.0, "wait", "model")),
    "Google's quota of a model": ((429, err("You have exhausted your capacity on this model. Your quota will reset after 3h29m12s.", code=429)),
                                  limited(12552.0, "capacity", "model")),
    "Google's limit": ((429, google(429, "RESOURCE_EXHAUSTED", QUOTA, PER_MODEL, RETRY)), limited(34.0, "exceeded", "model")),
    "Google's limit of a project": ((429, google(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota).", {**RETRY, "retryDelay": "45.8379s"})[0]), limited(45.8379, "exhausted")),
    "OpenRouter's limit": ((429, err("Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day", code=429, metadata={"headers": {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(SOON * 1000))}})), limited(1000.0, "free-models")),
    "OpenRouter's provider": ((429, err("Provider returned error", code=429, metadata={"raw": "both is temporarily rate-limited upstream. Please retry shortly", "retry_after_seconds": 12})), limited(12.0, "error: both is temporarily", "model")),
    "Anthropic's limit": ((429, anthropic("rate_limit_error", "This request would exceed your rate limit."), {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(SOON)), "anthropic-ratelimit-tokens-remaining": "9", "anthropic-ratelimit-tokens-reset": "2999-09-09T05:47:30Z"}), limited(1000.0, "exceed")),
    "Mistral's limit": ((429, {"message": "Requests rate limit exceeded"}), limited(None, "up: Requests")),
    "Mistral's tier": ((429, {"object": "error", "message": "Service tier capacity exceeded for this model.", "type": "invalid_request_error", "param": None, "code": "3505"}), ("limit", 429, "3505", None, "tier", "model")),
    "Azure's limit": ((429, err("Requests have exceeded call rate limit. Please retry after 20 seconds.", code="429")), limited(20.0, "retry after")),
    "Cerebras' limit": ((429, {"message": "Tokens per day limit exceeded", "type": "too_many_tokens_error", "param": "quota", "code": "token_quota_exceeded"}, {"x-ratelimit-reset-tokens-day": "33011.38", "x-ratelimit-remaining-tokens-day": "0"}), ("limit", 429, "token_quota_exceeded", 33011.38, "per day")),
    "xAI's limit": ((429, b"Too many tokens for team x and model both. Your team's rate limit is 65605/16000."), limited(None, "Too many", "model")),
    "NIM's limit": ((429, {"status": 429, "title": "Too Many Requests"}), limited(None, "up: Too Many Requests")),
    "LiteLLM's limit": ((429, err("litellm.RateLimitError: No deployments available for selected model, Try again in 60 seconds. Passed model=both. Deployments={'a91f829622': {}}", code="429")), limited(60.0, "up: No deployments available for selected model, Try again in 60 seconds.", "model")),
    "LiteLLM's limit as a 500": ((500, err("litellm.RateLimitError: RateLimitError: GroqException - " + json.dumps(err(LEFT)), code="500")), limited(7.66, "up: Rate limit reached", "model")),
    "503 with a time": ((503, err("busy"), {"retry-after": "30"}), ("limit", 503, "upstream_error", 30.0, "busy")),
    "529 with a time": ((529, anthropic("overloaded_error", "Overloaded"), {"retry-after": "30"}), ("limit", 503, "upstream_error", 30.0, "Overloaded")),
    # -- the client's own mistake
    "too long": ((400, err("This model's maximum context length is 8192 tokens.", type="invalid_request_error", param="messages", code="context_length_exceeded")), ("request", 400, "context_length_exceeded", None, "This model's")),
    "OpenAI's content policy": ((400, err("Your request was rejected by our safety system.", code="content_policy_violation")), ("request", 400, "content_policy_violation", None, "Your request")),
    "FastAPI's list": ((422, {"detail": [{"type": "missing", "loc": ["body", "messages", 0, "role"], "msg": "Field required"}, {"loc": ["body"], "msg": "bad"}]}), wrong(422, "messages.0.role: Field required; bad")),
    "Mistral's list": ((422, {"object": "error", "message": {"detail": [{"loc": ["body", "n"], "msg": "too small"}]}, "type": "invalid_request_error"}), wrong(422, "n: too small")),
    "a list of errors": ((400, {"errors": [{"message": "one"}, "two"]}), wrong(400, "one")),
    "a plain text": ((400, b"model runner: bad grammar\n"), wrong(400, "model runner: bad grammar")),
    "another object": ((400, {"reason": "odd"}), wrong(400, '{"reason":"odd"}')),
    "LiteLLM's wrapping": ((400, err(CAPS, code="400")), wrong(400, VLLM)),
    "LiteLLM's wrapping as a 500": ((500, err(CAPS)), wrong(400, VLLM)),
    "a client's model named as a bad key": ((400, err("Invalid value `incorrect api key provided`: 'both'")), wrong(400, "Invalid value")),
    # -- the server's failure
    "Google's overload": ((503, google(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")), failed(503, "overloaded")),
    "an overload": ((529, anthropic("overloaded_error", "Overloaded")), failed(503, "Overloaded")),
    "500": ((500, b"Internal Server Error", {"x-ratelimit-reset-requests": "8.64s"}), failed(502, "up: Internal Server Error")),
    "Envoy's 503": ((503, b"upstream connect error or disconnect/reset before headers"), failed(503, "upstream connect error")),
    "a page with 502": ((502, b"<html><title>502 Bad Gateway</title></html>"), failed(502, "web page: 502 Bad Gateway.")),
    # -- an error where an answer should be
    "200, a limit by its number": ((200, err("slow down", code=429)), limited(None, "slow down")),
    "200, a limit by its name": ((200, anthropic("rate_limit_error", "slow down")), limited(None, "slow down")),
    "200, overloaded": ((200, anthropic("overloaded_error", "Overloaded")), failed(503, "Overloaded")),
    "200, in LiteLLM's words": ((200, err("litellm.ServiceUnavailableError: VertexException - The service is down", code=None)), failed(503, "up: The service is down")),
    "200, a limit by its words": ((200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit exceeded(RPM)"}}), limited(None, "up: rate limit")),
    "200, a key by its words": ((200, {"base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}), key_refused("(401): invalid api key")),
    "200, of no known kind": ((200, err("boom", type="odd")), failed(502, "boom")),
})
def test_what_the_errors_of_upstreams_mean(case):
    (status, body, *headers), (kind, seen, code, wait, words, *scope) = case
    error = akashproxy.error_from_body("up", status, body, ["sk-secret-key"], *headers, models=["both"])
    assert (error.category.value, error.status, error.code) == (kind, seen, code), error.message
    assert error.retry_after == (wait and pytest.approx(wait, abs=300 if wait == 1000 else 0.01))
    assert words in error.message and "\\" not in error.message and error.cooldown_scope == (scope or ["controller"])[0], error.message
    assert error.upstream_status == status or status == 200
    assert error.type != "server_error" or seen >= 500
    assert error.headers().get("x-should-retry") == ("false" if kind in ("auth", "refused") else None)


@table({
    # one client's request: (status, body) -> the statuses that it may have
    "a model that is not there": ((401, err("Model typo is not supported")), (403, 404)),
    "a project without the model": ((403, err("Project `p` does not have access to model `typo`", code="model_not_found")), (403, 404)),
    "a flagged prompt": ((403, err("Your input was flagged", code=403, metadata={"reasons": ["violence"]})), (403,)),
    "too many tokens": ((402, err(AFFORD, code=402)), (402,)),
    "a firewall": ((403, CF_PAGE), (403,)),
    "a large request": ((429, err("Request too large for typo"), b"Retry-After: 172800\r\n"), (429,)),
    "a long request": ((429, err("This exceeds the maximum number of tokens allowed per request."), b"Retry-After: 172800\r\n"), (429,)),
    "a long context": ((429, err("Extra usage is required for long context requests."), b"Retry-After: 172800\r\n"), (429,)),
    "a long prompt": ((429, err("The prompt is over the limit. Please reduce the length of the messages."), b"Retry-After: 172800\r\n"), (429,)),
})
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_refused_request_stops_nobody_else(case, path, pool):
    (status, body, *extra), statuses = case
    answer = reply(status, body, "text/html" if isinstance(body, bytes) else "application/json", *extra)
    fakes = [FakeOpenAI().sends(answer) for _ in range(2)]
    server = pool(*fakes)
    got = ask(server, "POST", path, {**WANTS[path], "model": "typo"})
    assert got.status in statuses and (got.status == 404 or got.headers["x-should-retry"] == "false")
    assert route_of(got) == f"a={status}, b={status}" and [len(fake.bodies()) for fake in fakes] == [1, 1]
    words = akashproxy.error_words(akashproxy.error_fields(body)) if isinstance(body, dict) else "Attention Required"
    assert words in got.json["error"]["message"]
    states = ask(server, path="/status").json["controllers"]
    assert [(state["failed"], state["rests_for_seconds"]) for state in states] == [(0, 0), (0, 0)]
    assert chat(server, BOTH).status == 200


@table({
    # name: (headers, body, message, seconds)
    "equal fields that were joined": ({"retry-after": "30, 30"}, {}, "", 30), "with its unit": ({"retry-after": "30s"}, {}, "", 30),
    "a fraction": ({"retry-after": "2.5"}, {}, "", 2.5), "an absurd date": ({"retry-after": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, {}, "", None),
    "a date long ago": ({"retry-after": "Mon, 01 Jan 0000 00:00:00 GMT"}, {}, "", 1), "an ISO date": ({"retry-after": "2001-09-09T01:47:40.123456789Z"}, {}, "", 60.123456),
    "RFC RateLimit": ({"ratelimit": '"default";r=0;t=60'}, {}, "", 60), "with some left": ({"ratelimit": '"default";r=3;t=60'}, {}, "", None),
    "the draft's RateLimit": ({"ratelimit": "limit=100, remaining=0, reset=50"}, {}, "", 50), "RateLimit-Reset": ({"ratelimit-reset": "60"}, {}, "", 60),
    "not used up": ({"ratelimit-reset": "60", "ratelimit-remaining": "3"}, {}, "", None), "X-Rate-Limit-Reset": ({"x-rate-limit-reset": "1000000060"}, {}, "", 60),
    "Anthropic's": ({"anthropic-ratelimit-tokens-reset": "2001-09-09T01:47:40Z", "anthropic-ratelimit-tokens-remaining": "0"}, {}, "", 60),
    "Google's": ({}, {"error": {"details": [{"a": 1}, {"retryDelay": "45.8379s"}]}}, "", 45.8379),
    "OpenRouter's": ({}, {"error": {"metadata": {"headers": {"X-RateLimit-Reset": "1000000060000"}}}}, "", 60),
    "X-Retry-After": ({"x-retry-after": "30"}, {}, "", 30), "a limit's": ({"x-ratelimit-retry-after": "31"}, {}, "", 31), "Azure's": ({"x-ms-retry-after-ms": "2500"}, {}, "", 2.5),
    "in full": ({"x-rate-limit-retry-after-seconds": "33"}, {}, "", 33), "a reset's": ({"x-ratelimit-reset-after": "12"}, {}, "", 12),
    "resetAfter": ({}, {"error": {"resetAfter": "12s"}}, "", 12), "retry_in": ({}, {"error": {"retry_in": 9}}, "", 9), "in seconds": ({}, {"retry_after_secs": 5}, "", 5),
    "at least": ({}, {}, "Please wait at least 30 seconds.", 30), "approximately": ({}, {}, "Retry in approximately 2 minutes.", 120), "another name": ({"x-retry-afterwards": "3"}, {"retry": 4}, "", None),
    "OpenRouter's other": ({}, {"error": {"metadata": {"retry_after_seconds": 7}}}, "", 7), "milliseconds": ({}, {"error": {"retry_after_ms": 7500}}, "", 7.5),
    "camel case": ({}, {"retryAfter": "20"}, "", 20), "Codex'": ({}, {"error": {"resets_in_seconds": 3600}}, "", 3600),
    "seconds in words": ({}, {}, "Please try again in 20s. Contact us", 20), "minutes and seconds": ({}, {}, "Please try again in 7m30.5s.", 450.5),
    "a tenth in ISO": ({"retry-after": "2001-09-09T01:47:40.5Z"}, {}, "", 60.5), "whole words": ({}, {}, "Please retry after 2 minutes and 3 seconds.", 123), "short": ({}, {}, "Try again in 350ms", 1),
    "Azure's words": ({}, {}, "Please retry after 20 seconds.", 20), "LiteLLM's words": ({}, {}, "model, Try again in 60 seconds. Passed model=x", 60),
    "without a unit": ({}, {}, "Try again in 15", 15), "too soon": ({"retry-after": "0"}, {}, "", 1), "two days at most": ({}, {}, "try again in 99 days", 172800),
    "later": ({}, {}, "Please try again later.", None), "in a model": ({}, {}, "try again in gpt-4o", None),
    "a header before a message": ({"retry-after": "5"}, {}, "try again in 20s", 5), "true is no number": ({}, {"retry_after": True}, "", None),
    "negative": ({"retry-after": "-5"}, {}, "", None), "infinite": ({"retry-after": "inf"}, {"retry_after": math.inf}, "", None), "not a number": ({}, {"retry_after": math.nan}, "", None),
    "seconds": ({"retry-after": "17"}, {}, "", 17), "milliseconds in a header": ({"retry-after-ms": "2500", "retry-after": "3"}, {}, "", 2.5),
    "a date": ({"retry-after": "Sun, 09 Sep 2001 01:48:20 GMT"}, {}, "", 100), "nonsense": ({"retry-after": "soon"}, {}, "", None),
    "Akash's": ({"x-tokenlimit-reset": "1000000900"}, {}, "", 900.0), "a moment in milliseconds": ({"x-ratelimit-reset": "1000000030000"}, {}, "", 30.0),
    "Retry-After with a moment": ({"retry-after": "1000000007"}, {}, "", 7.0), "a century": ({"retry-after": "3000000000"}, {}, "", 172800.0),
    "resetTime": ({}, {"resetTime": "2001-09-09T01:48:20.500Z"}, "", 100.5),
    "OpenAI's, the one that is used up": ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "5",
                                           "x-ratelimit-reset-tokens": "1m30.5s", "x-ratelimit-remaining-tokens": "0"}, {}, "", 90.5),
    "several limits": ({"ratelimit": '"day";r=5;t=9000, "burst";r=0;t=60'}, {}, "", 60), "throttled": ({}, {}, "Request was throttled. Expected available in 20 seconds.", 20),
    "with a colon": ({}, {}, "Retry-After: 20s", 20), "Google's other": ({}, {"error": {"details": [{"metadata": {"quotaResetDelay": "34.5s"}}]}}, "", 34.5), "wait_seconds": ({}, {"wait_seconds": 9}, "", 9),
    "a date in words": ({}, {}, "The 5-hour limit is reached, resets at 2001-09-09T03:48:20+02:00 (2056)", 100), "one in UTC": ({}, {}, "You are blocked until 2001-09-09 01:48:20 UTC.", 100),
    "one of no zone": ({}, {}, "Your limit will reset at 2001-09-09 01:48:20", None),
    "hours": ({"x-ratelimit-reset": "6h"}, {}, "", 21600), "short ones": ({"x-ratelimit-reset-tokens": "120ms"}, {}, "", 1.0), "none": ({}, {}, "", None),
})
def test_how_long_an_upstream_asks_to_wait(headers, body, message, seconds):
    got = akashproxy.retry_after_seconds(headers, body, lambda: 1e9, message)
    assert got == (seconds if seconds is None else pytest.approx(seconds, abs=1e-3))


def test_no_header_or_body_of_an_error_does_harm():
    random = __import__("random").Random(7)
    pieces = ["retry-after", "1", "9" * 14, ".5", "-", "s", "ms", "m", " GMT", "Mon, 01 Jan ", "2024", "T00:00:00", "Z", "+99:99", ":", ",", "r=0", ";t=",
              "reset", "try again in ", "inf", "nan", "٥", "\ud800", "\0", "{", '"', "'", "\\", "litellm.", "RateLimitError: ", "message", "***", "sk-..."]
    names = ["retry-after", "retry-after-ms", "ratelimit", "x-ratelimit-reset", "anthropic-ratelimit-a-reset", "x-rate-limit-reset", "ratelimit-remaining"]
    keys = ["error", "errors", "message", "detail", "details", "metadata", "headers", "raw", "code", "type", "status", "loc", "msg", "retryDelay", "reset_at"]
    text = lambda: "".join(random.choices(pieces, k=random.randrange(6)))

    def value(depth=4):
        built = [text, lambda: random.choice([None, True, -1, 0, 429, 1 << 70, 1e308])]
        built += [lambda: [value(depth - 1) for _ in range(random.randrange(3))],
                 lambda: {random.choice(keys): value(depth - 1) for _ in range(random.randrange(4))}] if depth else []
        return random.choice(built)()

    for _ in range(800 * FUZZ):
        headers = {random.choice(names): text() for _ in range(3)}
        body = value() if random.random() < 0.8 else text().encode("utf-8", "replace")
        error = akashproxy.error_from_body("up", random.choice([200, 301, 400, 401, 403, 418, 429, 500, 503, 599]), body, ["sk-secret-key"], headers, ["m"])
        assert 400 <= error.status < 600 and isinstance(error.category, Category) and len(error.message) < 1300
        assert error.retry_after is None or 1 <= error.retry_after <= 172800
        akashproxy.Dialect.error_body(error), error.headers()
        akashproxy.akash_error(text() * 3, "m", ["sk-secret-key"])


@pytest.mark.parametrize("text, expected", {
    # what comes as an error part of the stream: (status, code, words, retry_after)
    CAPS: (400, None, "Akash Chat: " + VLLM, None),
    "Failed after 3 attempts. Last error: " + CAPS: (400, None, "Akash Chat: " + VLLM, None),
    "litellm.BadRequestError: Hosted_vllmException - {'error': {'message': 'Conversation roles must alternate', 'code': 400}}": (400, None, "Akash Chat: Conversation roles must alternate", None),
    "Failed after 3 attempts. Last error: litellm.RateLimitError: No deployments available for selected model. Passed model=x. Deployments={'a9': 1}": (429, "rate_limit_exceeded", "Akash Chat: No deployments available for selected model.", None),
    "No deployments available for selected model, Try again in 60 seconds. Passed model=x. pre-call-checks=False": (429, "rate_limit_exceeded", "Akash Chat: No deployments", 60),
    "litellm.RateLimitError: RateLimitError: Hosted_vllmException - Max parallel request limit reached": (429, "rate_limit_exceeded", "Akash Chat: Max parallel request limit reached", None),
    "litellm.ContentPolicyViolationError: The prompt is not allowed": (400, "content_policy_violation", "Akash Chat: The prompt is not allowed", None),
    "litellm.ContextWindowExceededError: ContextWindowExceededError: 9000 > 8192": (400, "context_length_exceeded", "Akash Chat: 9000 > 8192", None),
    "litellm.ServiceUnavailableError: Hosted_vllmException - down": (503, "upstream_error", "Akash Chat: down", None),
    "litellm.Timeout: APITimeoutError - Request timed out": (504, "upstream_error", "timed out", None),
    "litellm.InternalServerError: InternalServerError: x": (502, "upstream_error", "Akash Chat: x", None),
    "litellm.APIConnectionError: Hosted_vllmException - Connection error.": (502, "upstream_error", "Connection error", None),
    "litellm.AuthenticationError: OpenAIException - Incorrect API key provided": (424, "upstream_auth", "Incorrect", None),
    "litellm.PermissionDeniedError: no": (424, "upstream_auth", "Akash Chat: no", None),
    "litellm.BudgetExceededError: Budget has been exceeded!": (424, "upstream_auth", "Budget", None),
    "litellm.UnsupportedParamsError: x does not support parameters: ['y']": (400, None, "does not support", None),
    "litellm.NotFoundError: NotFoundError: Hosted_vllmException - gone": (500, "model_not_found", "does not exist", None),
    "Invalid data content. Content string is not a base64-encoded media.": (400, None, "base64", None),
    "terminated": (502, "upstream_error", "Akash Chat: terminated", None),
}.items())
@pytest.mark.parametrize("form", ["part", "event", "json"])
def test_what_is_behind_akash_is_heard(text, expected, form, akash, serve):
    status, code, words, wait = expected
    encoded = json.dumps(text).encode()
    akash.sends({
        "part": STREAM_HEAD + chunks(b"3:" + encoded + b"\n"),
        "event": STREAM_HEAD + chunks(b'data: {"type":"error","errorText":' + encoded + b"}\n\n"),
        "json": reply(400 if status == 400 else 500, b'{"error":"Error","message":' + encoded + b"}")}[form])
    got = chat(serve(), stream=form != "json")
    assert (got.status, got.json["error"]["code"]) == (status, code) and words in got.json["error"]["message"], got.body
    assert "litellm" not in got.body.decode() and "Deployments" not in got.body.decode()
    assert got.headers.get("retry-after") == (str(wait) if wait else None) or status == 429


def test_a_limit_that_akash_tells_in_a_stream_is_one_of_the_model():
    decoder = AkashDecoder("m")
    decoder.feed(b'3:"litellm.RateLimitError: slow down, try again in 2 minutes"\n')
    assert (decoder.error.cooldown_scope, decoder.error.retry_after, decoder.error.category) == ("model", 120, Category.RATE_LIMIT)


@pytest.mark.parametrize("size, status", [(11_000_000, 413), (1000, 502)])
def test_what_is_too_large_for_akash_is_said(size, status, akash, serve):
    akash.sends(reply(500, b"", ""))
    image = picture("data:image/png;base64," + "A" * size)
    got = chat(serve(), messages=[user([text_part("hi"), image])])
    assert got.status == status and ("too large" in got.json["error"]["message"]) == (status == 413)
    assert got.headers.get("x-should-retry") == ("false" if status == 413 else None)


# == secrets ==================================================================================

KEY, HEADER, COOKIE = "sk-proj-Zq81mWv0QpLr7TtYcX5kAa", 'Bearer hdr"Wq93\\nVbXeRtY77', "appSession=cKw5Jx3PzQ88LmN1; theme=1"
SECRETS = {
    "whole": "key {0} refused", "in a text": "x{0}y", "twice": "{0} and {0}", "cut": "your key {0:.15} is bad", "its end is gone": "... key={0:.10}",
    "in quotes": "'{0}'", "across the end of what is kept": "x" * 990 + "{0}", "far behind": "x" * 3990 + "{0}",
}


def leaks(text, *secrets):
    """The pieces of secrets in a text: eight characters from their beginning, or any twelve."""
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return [secret for secret in secrets if secret[:8] in text or any(secret[at:at + 16] in text for at in range(len(secret) - 15))]


PLACES = {
    "message": lambda said: {"error": {"message": said}}, "code": lambda said: {"error": {"message": "m", "code": said}},
    "type": lambda said: {"error": {"message": "m", "type": said}}, "param": lambda said: {"error": {"message": "m", "param": said}},
    "not the first key": lambda said: {"id": "x", "error": {"message": said}}, "a list": lambda said: [{"error": {"message": said}}],
    "errors": lambda said: {"errors": [{"message": said}]}, "detail": lambda said: {"detail": [{"loc": [said], "msg": said}]},
    "an object in a text": lambda said: {"error": {"message": json.dumps({"error": {"message": said}})}},
    "LiteLLM's words": lambda said: {"error": {"message": "litellm.AuthenticationError: XException - " + repr({"error": {"message": said}})}},
    "text alone": lambda said: {"error": said}, "another object": lambda said: {"why": said},
    "OpenRouter's raw": lambda said: {"error": {"message": "Provider returned error", "metadata": {"raw": said}}},
    "plain text": lambda said: said.encode(), "a page": lambda said: f"<html><title>{said}</title></html>".encode(),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", SECRETS)
def test_no_error_shows_a_secret(place, form):
    secrets = (KEY, HEADER[len("Bearer "):])
    for secret in secrets:
        for status in (200, 302, 400, 401, 402, 403, 404, 413, 418, 422, 429, 500, 503):
            error = akashproxy.error_from_body("up", status, PLACES[place](SECRETS[form].format(secret)), secrets)
            displayed = json.dumps([error.message, error.code, error.type, error.param, error.legacy_message, str(error)], ensure_ascii=False)
            assert not leaks(displayed, *secrets), displayed
            assert not leaks(json.loads(displayed)[0], *secrets)


@pytest.mark.parametrize("place", [location for location in PLACES if location not in ("plain text", "a page")])
@pytest.mark.parametrize("kind", ["openai", "akash"])
def test_no_answer_log_or_status_shows_a_secret(place, kind, pool, caplog):
    caplog.set_level("DEBUG")
    fake, cookies = (FakeOpenAI(), []) if kind == "openai" else (FakeAkash(), ["cKw5Jx3PzQ88LmN1", "sess10nVq83kLpZ0"])
    if kind == "akash":
        fake.session = reply(body=b'{"success":true}', extra=b"set-cookie: session_token=sess10nVq83kLpZ0; Max-Age=600\r\n")
    more = {"api_key": KEY, "headers": {"X-Key": HEADER}, **({} if kind == "openai" else {"models": ["both"]})}
    server = pool((fake, more), akash_cookie=COOKIE, log_level="debug")
    hidden = KEY, HEADER[len("Bearer "):], json.dumps(HEADER)[15:-1], "cKw5Jx3PzQ88LmN1", "sess10nVq83kLpZ0"
    for secret in (KEY, HEADER, *cookies):
        body = json.dumps(PLACES[place](SECRETS["whole"].format(secret))).encode()
        page = json.dumps(json.dumps(json.loads(body))).encode()
        faults = [reply(status, body) for status in (200, 400, 401, 404, 418, 429, 500)]
        if kind == "openai" and place not in ("detail", "another object"):      # in a stream those are no errors
            faults += [fake.head() + chunks(b"data: " + body + b"\n\n"),
                       fake.head() + chunks(fake.event({"content": "a"}) + b"data: " + body + b"\n\n" + fake.event({"content": "b"})),
                       reply(200, body, f"application/json; x={secret}" if '"' not in secret else "application/json")]
        elif kind == "akash":
            faults += [STREAM_HEAD + chunks(b"3:" + page + b"\n"), STREAM_HEAD + chunks(b'0:"a"\n3:' + page + b"\n"),
                       STREAM_HEAD + chunks(b'data: {"type":"error","errorText":' + page + b"}\n\n")]
        with link_to(server) as link:
            for fault, path, streamed in itertools.product(faults, ("/v1/chat/completions", "/v1/messages"), (False, True)):
                fake.sends(fault, fault)
                end_cooldowns(server)
                got = ask_again(link, "POST", path, {**WANTS[path], "stream": streamed})
                fake.faults.clear()
                assert not leaks(got.body, *hidden) and not leaks(str(got.headers), *hidden), (fault, got.body)
    assert not leaks(ask(server, path="/status").body, *hidden) and not leaks(caplog.text, *hidden)


def test_a_head_that_is_no_http_shows_no_secret_in_the_log(fake, pool, caplog):
    caplog.set_level("DEBUG")
    server = pool((fake, {"api_key": KEY}), log_level="debug")
    for line in (f"Transfer-Encoding: {KEY}", f"Transfer-Encoding: '{KEY}'", f"Content-Encoding: {KEY}", f"Content-Length: {KEY}", f"{KEY} : x", f"X: a\r{KEY}"):
        fake.sends(f"HTTP/1.1 200 {KEY}\r\n{line}\r\n\r\n".encode())
        got = chat(server, BOTH)
        assert got.status == 502 and not leaks(got.body, KEY)
    fake.sends(f"{KEY} 200 OK\r\n\r\n".encode())
    assert chat(server, BOTH).status == 502 and not leaks(caplog.text, KEY)


def test_an_error_in_the_middle_of_a_relayed_stream_shows_no_secret(pool):
    """Also where it comes in one read with an event that is passed on unread."""
    error, events = b'data: {"error":{"message":"key %b"}}\n\n' % KEY.encode(), [FakeOpenAI.event({"content": word}) for word in "ab"]
    events = [event.replace(b'"finish_reason": null}]}\n\n', b'"finish_reason":null}]}\n\n') for event in events]
    named = b'event: error\ndata: {"message":"key %b"}\n\n' % KEY.encode()
    decoder = akashproxy.PassthroughDecoder("up", secrets=[KEY])
    assert b"".join(event.data for event in decoder.feed(events[0] + named)) == (events[0] + named).replace(KEY.encode(), b"***")
    decoder = akashproxy.PassthroughDecoder("up", secrets=[KEY])
    sent = b"".join(event.data for data in (events[0], events[1], error + events[1], error) for event in decoder.feed(data))
    assert sent == b"".join((*events, error, events[1], error)).replace(KEY.encode(), b"***")
    expected = FakeOpenAI.event({"content": '***{"error"}*** sk-...abcd'}) + error.replace(KEY.encode(), b"x***y")
    assert b"".join(event.data for event in decoder.feed(expected)) == expected, "what is no secret is passed on as it is"


@pytest.mark.parametrize("model", ["invalid-key", "incorrect api key", "key expired", "billing quota"])
def test_a_name_of_a_model_condemns_no_key(model):
    quoted = [err(f"Your prompt {mark[0]}my api key is invalid{mark[1]} was flagged") for mark in ("''", '""', "``", "“”", "«»")]
    assert {akashproxy.error_from_body("up", 403, body).category for body in quoted} == {Category.REFUSED}
    spent = err("Key limit exceeded (total limit).")
    assert akashproxy.error_from_body("up", 403, spent, models=[model, "i", "e"]).category is Category.AUTH, "letters of other words"
    for status, message in ((401, "Model {} is not supported"), (403, "Project `p` does not have access to model `{}`"),
                            (403, 'No access to "{}" for this model.'), (400, "{} is not a valid model ID"), (404, "Model {} not found")):
        assert akashproxy.error_from_body("up", status, err(message.format(model)), models=[model]).category in (Category.MODEL, Category.REFUSED)


@table({
    # (secrets, text): what is left of it
    "a word of its own": (["s3cret"], "bad s3cret!", "bad ***!"), "not within words": (["none"], "nonesuch, none", "nonesuch, ***"),
    "three letters": (["key"], "the key", "the key"), "none": (["", " "], "the key", "the key"), "two of them": (["sk-12345678", "sk-12345678-b"], "sk-12345678-b", "***"),
    "in a URL": (["a b/c&d=e+f"], "?key=a%20b%2Fc%26d%3De%2Bf", "?key=***"), "in JSON": (['say "hello" \\'], '{"a": "say \\"hello\\" \\\\"}', '{"a": "***"}'),
    "in base 64": (["sk-12345678"], "Basic c2stMTIzNDU2Nzg=", "Basic ***="), "as a hash": (["sk-12345678"], hashlib.sha256(b"sk-12345678").hexdigest(), "***"),
    **{f"Basic credentials, {user!r}": (["sk-12345678-abcd"], f"Basic {base64.b64encode(user + b'sk-12345678-abcd').decode()}", left)
       for user, left in ((b"a:", "Basic YTp***"), (b"ab:", "Basic YWI6***=="), (b"abc:", "Basic YWJjOn***="))},
    "in base 64 for URLs": (["~~~???>>>sk-1234"], base64.urlsafe_b64encode(b"~~~???>>>sk-1234").decode(), "***=="),
    "JSON's escapes": (["sk-12345678"], "no " + "".join(f"\\u{ord(char):04X}" for char in "sk-12345678") + "!", "no ***!"),
    "JSON's escapes within JSON": (["sk-12345678"], "no " + "".join(f"\\\\u{ord(char):04x}" for char in "sk-12345678") + "!", "no ***!"),
    "HTML's escapes within HTML": (["sk-12345678"], "no " + "".join(f"&amp;#{ord(char)};" for char in "sk-1234") + "&amp;#x35;678!", "no ***!"),
    "HTML's decimal escapes": (["sk-12345678"], "no " + "".join(f"&#{ord(char)};" for char in "sk-1234") + "&#00053&#x0036;78!", "no ***!"),
    "no escapes": (["sk-12345678"], "sk-&#1155;&#49", "sk-&#1155;&#49"),
    "escapes of some": (["sk-12345678"], "no s\\u006b-1%32345&#x36;78!", "no ***!"), "others' escapes": (["sk-12345678"], "a%20b\\u0041 sk-12345678", "a%20b\\u0041 ***"),
    "ten thousand times": (["sk-12345678"], "no sk-12345678, " * 10_000, "***"),
    "in hexadecimal digits": (["sk-12345678"], b"sk-12345678".hex(), "***"),
    "encoded twice": (["a b/c&d=e+f"], "a%2520b%252Fc%2526d%253De%252Bf", "***"),
    "in capitals": (["sk-abcdefgh"], "no SK-ABCDEFGH", "no ***"), "a header in small letters": (["Sk-ABCDEFGH"], "İİ sk-abcdefgh", "İİ ***"),
    "the rest after a beginning that its encoded form shares": (["hdrsecret+Val/ue==9911"], "no hdrsecret+Val/ue==9911!", "no ***!"),
    "its middle is gone": (["gsk_Zq81mWv0QpLr7TtY"], "gsk_Zq81\u2026pLr7TtY, gsk_Zq81mW...TtY or gsk_Zq81mXXXXXTtY", "***, *** or ***"),
    "redacted by the upstream": (["gsk_Zq81mWv0QpLr7TtY"], "key gsk_Zq81m[REDACTED]7TtY (x)", "key *** (x)"),
    "masked by the upstream": (["x"], "provided: sk-proj-****MxYA. See", "provided: ***. See"), "LiteLLM's mask": (["x"], "Key = sk-...8aSP,", "Key = ***,"),
    "its middle": (["0123456789abcdefghijklmnopqrstuvwxyz"], "x456789abcdefghijklmny", "x***y"),
    "twelve of its middle": (["0123456789abcdefghijklmnopqrstuvwxyz"], "56789abcdefg", "***"),
    "a few letters alike": (["abcdefghijklmnop"], "fghijklm", "fghijklm"),
    "overlapping pieces": (["abcdefgh12345678" * 2 + "z"], "abcdefgh12345678" * 3 + " kept", "*** kept"),
    "the same letter again": (["a" * 40], "a" * 100 + " kept", "*** kept"), "what is no secret": (["sk-12345678"], "max_tokens must be less than 8192", "max_tokens must be less than 8192"),
})
def test_redaction(secrets, text, left):
    assert re.sub(r"(\*{3})+a{0,7}", "***", akashproxy.redact(text, secrets)) == left


def test_fields_that_hide_nothing_are_not_blacked_out():
    options = akashproxy.ControllerSettings(headers={"Accept": "application/json", "anthropic-version": "2023-06-01", "X-Key": "https://abc.example",
                                                     "Authorization": "Bearer abcdefgh", "Cookie": "a=12345; b=67890"}, proxy="http://u:p%40ss@127.0.0.1:1")
    assert akashproxy.option_secrets(options) == ["abc.example", "abcdefgh", "12345", "67890", "p%40ss", "p@ss"]


# == dialects: Messages and Responses =========================================================


def tool(name="f", **types):
    properties = {key: {"type": kind} for key, kind in types.items()}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def called(*calls):
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}} for id, name, arguments in calls]}


def no_result(id):
    return returned(id, akashproxy.NO_RESULT)


PNG_SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBO"}
TOOL_USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": [1]}}


@table({
    # name: (fields of a body, what a chat says beside its usual, what is ignored)
    "system as text": ({"system": "be brief"}, {"messages": [system("be brief"), user("hi")]}, None),
    "system as blocks, and within": ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, text_part("b")],
                                      "messages": [system("c"), user("hi")]}, {"messages": [system("a\n\nb\n\nc"), user("hi")]}, None),
    "an empty system": ({"system": []}, {}, None),
    "blocks of text": ({"messages": [user([text_part("a"), text_part("b")])]}, {"messages": [user("a\n\nb")]}, None),
    "pictures": ({"messages": [user([text_part("a"), {"type": "image", "source": PNG_SOURCE},
                                     {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}])]},
                 {"messages": [user([text_part("a"), picture("data:image/png;base64,iVBO"), picture("https://x/y.png")])]}, None),
    "a document of text": ({"messages": [user([{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
                                              {"type": "document", "source": {"type": "content", "content": [text_part("e")]}}])]},
                           {"messages": [user("d\n\ne")]}, None),
    "tools called and their results": (
        {"messages": [user("go"), assistant([{"type": "thinking", "thinking": "h", "signature": "s"}, text_part("ok"),
                                                                    TOOL_USE, {**TOOL_USE, "id": "t2", "input": {}}]),
                      user([{"type": "tool_result", "tool_use_id": "t1", "content": "1"}, text_part("and?"),
                            {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [
                                text_part("2"), {"type": "image", "source": PNG_SOURCE}, {"type": "tool_reference", "tool_name": "g"},
                                {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": PNG_SOURCE}]}}]}])]},
        {"messages": [user("go"), {**called(("t1", "f", '{"a":[1]}'), ("t2", "f", "{}")), "content": "ok", "reasoning_content": "h"},
                      returned("t1", "1"),
                      returned("t2", 'Error: 2\n\n{"type":"tool_reference","tool_name":"g"}'),
                      user([text_part("and?")] + [picture("data:image/png;base64,iVBO")] * 2)]}, None),
    "a result of nothing": ({"messages": [assistant([TOOL_USE]), user([{"type": "tool_result", "tool_use_id": "t1"}])]},
                            {"messages": [called(("t1", "f", '{"a":[1]}')), returned("t1", "")]}, None),
    "what a server's tool did": ({"messages": [user("a"), assistant([{"type": "server_tool_use"}, text_part("b")])]},
                                 {"messages": [user("a"), assistant("b")]}, "server_tool_use"),
    "tools": ({"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}, {"type": "web_search_20250305", "name": "web_search"},
                         {"type": "custom", "name": "g", "strict": True}], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
              {"tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}},
                         {"type": "function", "function": {"name": "g", "strict": True, "parameters": {"type": "object", "properties": {}}}}],
               "tool_choice": "required", "parallel_tool_calls": False}, "web_search_20250305"),
    "one tool": ({"tools": [{"name": "f"}], "tool_choice": {"type": "tool", "name": "f"}},
                 {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
    "no tool that is left": ({"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "auto"}}, {}, "bash_20250124"),
    "how to think": ({"thinking": {"type": "enabled", "budget_tokens": 5000}}, {}, "thinking.budget_tokens"),
    "a form": ({"output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}}},
               {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True}}}, "output_config.effort"),
    "other fields": ({"temperature": 0, "top_p": 0.5, "top_k": 5, "stop_sequences": ["x"], "metadata": {"user_id": "u"}, "service_tier": "auto",
                      "context_management": {}}, {"temperature": 0, "top_p": 0.5, "stop": ["x"], "user": "u"}, "top_k, service_tier, context_management"),
})
def test_messages_become_a_chat(fields, chat_fields, ignored, fake, pool):
    got = ask(pool(fake), "POST", "/v1/messages?beta=true", {**ASKED, **fields}, {"anthropic-version": "2023-06-01", "x-api-key": "k"})
    assert got.status == 200, got.body
    assert fake.bodies()[0] == {"model": "both", "stream": False, "max_tokens": 64, "messages": [user("hi")], **chat_fields}
    assert got.headers.get("x-akashproxy-ignored") == ignored


@table({
    # name: (fields of a body, words)
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: 'tool' is not a valid role"),
    "a message that is text": ({"messages": ["x"]}, "messages[0]: 'None' is not a valid role"),
    "a document as PDF": ({"messages": [user([{"type": "document", "source": {**PNG_SOURCE, "media_type": "application/pdf"}}])]}, "messages[0].content[0]: 'document'"),
    "a file that is stored": ({"messages": [user([{"type": "image", "source": {"type": "file", "file_id": "f"}}])]}, "'image'"),
    "content of nothing": ({"messages": [user(None)]}, "'None'"),
    "an unknown block": ({"messages": [user([{"type": "hologram"}])]}, "'hologram'"),
    "tools that are no list": ({"tools": {}}, "'tools' must be a list"),
    "a tool without a name": ({"tools": [{}]}, "'name' is missing"),
    "a choice": ({"tools": [{"name": "f"}], "tool_choice": {"type": "most"}}, "'tool_choice' must be"),
    "no messages": ({"messages": None}, "'messages' is missing"),
    "a model that is a number": ({"model": 7}, "'model' must be"),
    "a conversation that is stored": ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "'thread'"),
    "a request for a summary": ({"compaction": {"type": "summarize"}}, "'compaction'"),
})
def test_what_a_chat_can_not_say_is_named(fields, words, pool):
    server = pool(FakeOpenAI())
    got = ask(server, "POST", "/v1/messages", {**ASKED, **fields})
    assert got.status == 400 and got.json["type"] == "error" and got.json["error"]["type"] == "invalid_request_error"
    assert words in got.json["error"]["message"]
    assert ask(server, "POST", "/v1/messages", ASKED).status == 200


def test_anthropics_client_is_told_to_send_whole_conversations(streamed, a, b, pool):
    sent = {**ASKED, "thread": {"type": "create"}, "stream": streamed}
    got = ask(pool(a), "POST", "/v1/messages", sent)
    assert got.status == 400 and got.json["error"]["details"] == {"error_code": "thread_unsupported_request"} and not a.bodies()
    ask(pool((b, {"paths": ["*"]})), "POST", "/v1/messages", sent)
    assert b.bodies()[-1]["thread"] == {"type": "create"}


def test_a_message_that_is_nested_too_deeply():
    deep = functools.reduce(lambda block, _: [{"type": "document", "source": {"type": "content", "content": block}}], range(2000), "x")
    with pytest.raises(APIError, match="nested too deeply"):
        akashproxy.Messages({**ASKED, "messages": [user(deep)]})


def named_events(body):
    """The events of a stream whose names are their types."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\ndata: ")
        events.append(json.loads(data))
        assert name == "event: " + events[-1]["type"]
    return events


def answered(*deltas, finish="stop", usage=None):
    """A fault: a stream with these deltas."""
    payload = b"" if usage is None else b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(usage).encode()
    frames = [*map(FakeOpenAI.event, deltas), FakeOpenAI.event({}, finish), payload, b"data: [DONE]\n\n"]
    return lambda sock, request: sock.sendall(FakeOpenAI.head() + chunks(*frames)) or True


ALL_KINDS = answered({"reasoning_content": "hm"}, {"content": "Hi"}, {"content": " you"}, calls((0, "call_1", "f", "")),
                     calls((0, None, None, '{"a":1}')), finish="tool_calls", usage={"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}})


def test_the_events_of_a_message(fake, pool):
    fake.faults.append(ALL_KINDS)
    events = named_events(ask(pool(fake), "POST", "/v1/messages", {**ASKED, "stream": True, "thinking": {"type": "adaptive"}}).body)
    first = events[0]["message"]
    assert first.pop("id").startswith("msg_") and first.pop("usage") == {"input_tokens": 5, "output_tokens": 0}
    assert first == {"type": "message", "role": "assistant", "model": "both", "content": [], "stop_reason": None, "stop_sequence": None}

    def block(at, start, delta, *pieces):
        kind, name = delta
        return [{"type": "content_block_start", "index": at, "content_block": start},
                *({"type": "content_block_delta", "index": at, "delta": {"type": kind, name: piece}} for piece in pieces),
                {"type": "content_block_stop", "index": at}]

    assert events[1:] == [
        *block(0, {"type": "thinking", "thinking": "", "signature": ""}, ("thinking_delta", "thinking"), "hm")[:-1],
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": akashproxy.UNSIGNED}}, {"type": "content_block_stop", "index": 0},
        *block(1, text_part(""), ("text_delta", "text"), "Hi", " you"),
        *block(2, {"type": "tool_use", "id": "call_1", "name": "f", "input": {}}, ("input_json_delta", "partial_json"), '{"a":1}'),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
         "usage": {"input_tokens": 7, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0, "output_tokens": 7}}, {"type": "message_stop"}]


def test_thoughts_are_for_who_asks_for_them(fake, pool):
    server = pool(fake)
    for thinking, displayed in ((None, False), ({"type": "disabled"}, False), ({"type": "adaptive", "display": "omitted"}, False),
                            ({"type": "enabled", "budget_tokens": 1024}, True)):
        for streamed in (False, True):
            fake.faults.append(answered({"reasoning_content": "hm"}, {"content": "Hi"}))
            got = ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed, "thinking": thinking})
            assert (b'"hm"' in got.body) == displayed and b'"Hi"' in got.body


def test_the_end_of_a_message(akash, serve):
    server = serve()
    for fields, chat_stream, stop in (({}, HELLO, ("end_turn", None)), ({"stop_sequences": ["the"]}, HELLO, ("stop_sequence", "the")),
                                      ({"max_tokens": 1}, HELLO, ("max_tokens", None)), ({}, HELLO.replace(b'"stop"', b'"content-filter"'), ("refusal", None))):
        akash.chat = chat_stream
        complete = ask(server, "POST", "/v1/messages", {**ASKED, **fields}).json
        last = named_events(ask(server, "POST", "/v1/messages", {**ASKED, **fields, "stream": True}).body)[-2]
        assert stop == (complete["stop_reason"], complete["stop_sequence"]) == (last["delta"]["stop_reason"], last["delta"]["stop_sequence"])
        assert complete["usage"]["input_tokens"] == 5 and complete["usage"]["output_tokens"] > 0 and last["usage"] == complete["usage"]


@table({
    # name: (method, path, body, header fields, status, type)
    "no token": ("POST", "/v1/messages", ASKED, {}, 401, "authentication_error"),
    "no token, for the models": ("GET", "/v1/models", None, {"anthropic-version": "2023-06-01"}, 401, "authentication_error"),
    "no JSON": ("POST", "/v1/messages", b"{", {"x-api-key": "k"}, 400, "invalid_request_error"),
    "a list": ("POST", "/v1/messages/count_tokens", b"[]", {"x-api-key": "k"}, 400, "invalid_request_error"),
    "too large": ("POST", "/v1/messages", b"x" * 2000, {"x-api-key": "k"}, 413, "request_too_large"),
    "a wrong method": ("DELETE", "/v1/messages", None, {"x-api-key": "k"}, 405, "invalid_request_error"),
    "an unknown model": ("POST", "/v1/messages", {**ASKED, "model": "none"}, {"Authorization": "Bearer k"}, 404, "not_found_error"),
    "an unknown model, by name": ("GET", "/v1/models/none", None, {"x-api-key": "k", "anthropic-version": "2023-06-01"}, 404, "not_found_error"),
    "tools at Akash": ("POST", "/v1/messages", {**ASKED, "tools": [{"name": "f"}]}, {"x-api-key": "k"}, 400, "invalid_request_error"),
    "a limit": ("POST", "/v1/messages", ASKED, {"x-api-key": "k"}, 429, "rate_limit_error"),
    "no room": ("POST", "/v1/messages", ASKED, {"x-api-key": "k"}, 529, "overloaded_error"),
    "a failure": ("POST", "/v1/messages", ASKED, {"x-api-key": "k"}, 502, "api_error"),
})
def test_errors_in_anthropics_form(method, path, body, headers, status, kind, akash, serve):
    answers = {404: UPSTREAM["model-unknown"][0], 429: reply(429, RATE), 502: reply(500), 529: reply(503)}
    if status in answers:
        akash.sends(answers[status])
    got = ask(serve(bearer_token=("k",), max_body=1000), method, path, body, headers)
    assert (got.status, got.json["type"], got.json["error"]["type"]) == (status, "error", kind) and got.json["error"]["message"]
    assert set(got.json) == {"type", "error"} and set(got.json["error"]) == {"type", "message"}


def test_counting_tokens_never_fails(akash, serve):
    server = serve()

    def count(**fields):
        got = ask(server, "POST", "/v1/messages/count_tokens?beta=true", fields)
        assert got.status == 200 and list(got.json) == ["input_tokens"], got.body
        return got.json["input_tokens"]

    text = "The quick brown fox jumps over the lazy dog. " * 100     # 1,001 tokens with o200k
    plain = count(model="m", messages=[user(text)])
    assert 900 < plain < 1300 and not akash.bodies()
    assert plain < count(model="m", messages=[user(text)], system="x" * 40, tools=[{"name": "f", "input_schema": {"type": "object"}}])
    assert 1600 < count(model="m", messages=[user([{"type": "tool_result", "content": [{"type": "image", "source": {**PNG_SOURCE, "data": "A" * 99999}}]}])]) < 1700
    for odd in (None, 7, [[[[]]]], {"a": {"b": [None, True, 1.5, {"type": "base64"}]}}, [user([{"type": "tool_result", "content": [[{"x": ["y"]}]]}])]):
        assert count(model=odd, messages=odd, system=odd) > 0
    deep = functools.reduce(lambda inner, _: [inner], range(400), "x")
    assert count(messages=deep) > 0


def test_a_client_that_leaves_before_a_count_of_tokens_is_no_bug(a, pool, caplog):
    server = pool((a, {"paths": ["/v1/messages*"]}))
    sock = connect(server)
    a.faults.append(lambda upstream, request: (reset(sock), a.status(503)(upstream, request)))     # so it is counted here
    sock.sendall(post("/v1/messages/count_tokens", ASKED))
    wait_for(lambda: a.bodies() and not server.connections)
    assert "bug" not in caplog.text and "stumbled" not in caplog.text


def test_models_in_anthropics_shape(akash, serve):
    server, nothing = serve(model_aliases={"claude-*": "Qwen/Qwen3"}), serve(keys=keys("a", models=("none*",)))
    version = {"anthropic-version": "2023-06-01"}
    models = ask(server, path="/v1/models", headers=version).json
    assert (models["first_id"], models["last_id"], models["has_more"]) == ("Meta-Llama-3-3-70B-Instruct", "AkashGen", False)
    assert models["data"][1] == {"type": "model", "id": "Qwen/Qwen3", "display_name": "Qwen/Qwen3", "created_at": "2021-07-20T10:40:00Z", "lifecycle": "active"}
    assert ask(server, path="/v1/models/claude-x", headers=version).json["id"] == "claude-x"
    assert ask(server, path="/v1/models/Qwen--Qwen3").json["object"] == "model"
    models = ask(nothing, path="/v1/models", headers={**version, "x-api-key": "a-key"})
    assert models.status == 200 and models.json == {"data": [], "has_more": False, "first_id": None, "last_id": None}


def test_anthropics_own_format_is_relayed_to_who_speaks_it(a, b, pool):
    begin = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}\n\n'
    expected = begin + b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    server = known(pool(a, (b, {"paths": ["/v1/messages*"], "models": ["claude"]})))     # so that b is alone, and does not rest
    odd = {"model": "claude", "messages": [user([{"type": "hologram"}])], "stream": True}
    b.faults.extend([b.raw(b.head() + chunks(expected)), b.raw(b.head() + chunks(begin)), b.raw(reply(body=b'{"input_tokens":70}')), b.status(500)])
    got = ask(server, "POST", "/v1/messages?beta=true", odd, {"anthropic-beta": "x"})
    request = next(request for request in b.requests if request.method == "POST")
    assert got.body == expected and b.bodies()[0] == odd and request.path == "/v1/messages?beta=true" and request.headers["anthropic-beta"] == "x"
    got = ask(server, "POST", "/v1/messages", odd)
    assert got.body.endswith(b'event: error\ndata: {"type":"error","error":{"message":"b: connection lost: it ended its answer early.","type":"api_error"}}\n\n')
    assert [ask(server, "POST", "/v1/messages/count_tokens", {**odd, "stream": False}).json for _ in "ab"] == [{"input_tokens": 70}, {"input_tokens": 7}]
    assert not a.bodies()


CALLED = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":[1]}', "id": "fc_1", "status": "completed"}


@table({
    # name: (fields of a body, what a chat says beside its usual, what is ignored)
    "instructions, and developers": ({"instructions": "a", "input": [developer("b"), {"type": "message", "role": "user", "content": "hi"}]},
                                     {"messages": [system("a\n\nb"), user("hi")]}, None),
    "parts": ({"input": [user([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://x/y.png", "detail": "auto"}]),
                         {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}, {"type": "refusal", "refusal": "c"}]}]},
              {"messages": [user([text_part("a"), picture("https://x/y.png")]), assistant("b\n\nc")]}, None),
    "calls and their outputs": (
        {"input": [user("go"), {"type": "reasoning", "id": "rs_1", "summary": []}, {"type": "item_reference", "id": "rs_1"}, assistant("ok"), CALLED, {**CALLED, "call_id": "c2", "arguments": ""},
                   {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "1"}, {"type": "input_image", "image_url": "data:x"}]},
                   {"type": "function_call_output", "call_id": "c2", "output": "2"}, {"type": "web_search_call", "id": "ws"}]},
        {"messages": [user("go"), {**called(("c1", "f", '{"a":[1]}'), ("c2", "f", "{}")), "content": "ok"}, returned("c1", "1"),
                      returned("c2", "2"), user([picture("data:x")])]}, "item_reference, web_search_call"),
    "a call at once": ({"input": [CALLED]}, {"messages": [called(("c1", "f", '{"a":[1]}')), no_result("c1")]}, None),
    "tools": ({"tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}, {"type": "namespace", "name": "n"},
                         {"type": "web_search"}, {"type": "mcp", "server_label": "c"}], "tool_choice": "auto", "parallel_tool_calls": True},
              {"tools": [{"type": "function", "function": {"name": "f", "description": "d", "strict": False, "parameters": {"type": "object", "properties": {}}}}],
               "tool_choice": "auto", "parallel_tool_calls": True}, "namespace, web_search, mcp"),
    "a custom tool": ({"tools": [{"type": "custom", "name": "patch", "description": "Patches.", "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}],
                       "tool_choice": {"type": "custom", "name": "patch"}},
                      {"tools": [{"type": "function", "function": {"name": "patch", "description": "Patches.\n\nstart: /.+/", "parameters": {
                          "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}}}], "tool_choice": {"type": "function", "function": {"name": "patch"}}}, None),
    "tools within the input": ({"tools": [{"type": "function", "name": "f"}], "input": [
        {"type": "additional_tools", "role": "developer", "tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]}]}, user("x"),
        {"type": "tool_search_call", "call_id": "c1", "arguments": {"query": "q"}}, {"type": "tool_search_output", "call_id": "c1", "tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "h"}]}]},
        {"tools": [tool(), tool("n__g"), tool("h")], "messages": [user("x"), called(("c1", "tool_search", '{"query":"q"}')),
                                                                  returned("c1", '{"type":"function","name":"f"}\n\n{"type":"function","name":"h"}')]}, None),
    "one tool": ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}},
                 {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
    "some tools": ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}},
                   {"tools": [tool()], "tool_choice": "required"}, "tool_choice.tools"),
    "no tool that is left": ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}, "parallel_tool_calls": False}, {}, "web_search"),
    "a form": ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}, "verbosity": "low"}},
               {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}}, "text.verbosity"),
    "JSON, no matter which": ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}, None),
    "other fields": ({"max_output_tokens": 9, "temperature": 0, "top_p": 0.5, "user": "u", "reasoning": {"effort": "low", "summary": "auto"}, "store": True,
                      "metadata": {"a": "b"}, "include": [], "text": {"format": {"type": "text"}}},
                     {"max_tokens": 9, "temperature": 0, "top_p": 0.5, "user": "u", "reasoning_effort": "low"}, "store"),
})
def test_responses_become_a_chat(fields, chat_fields, ignored, fake, pool):
    got = ask(pool(fake), "POST", "/v1/responses", {**WANTED, **fields})
    assert got.status == 200, got.body
    assert fake.bodies()[0] == {"model": "both", "stream": False, "messages": [user("hi")], **chat_fields}
    assert got.headers.get("x-akashproxy-ignored") == ignored
    assert got.json["output"][0]["content"][0]["text"] == "Hi there." and got.json["store"] is False
    assert all(got.json[name] == fields[name] for name in ("tools", "metadata", "temperature") if name in fields)


@table({
    # name: (fields of a body, words)
    "an earlier response": ({"previous_response_id": "resp_1"}, "'previous_response_id' can't be used: nothing is stored here"),
    "a conversation": ({"conversation": "c"}, "'conversation' can't be used"),
    "in the background": ({"background": True}, "'background' can't be used"),
    "a reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, '"store": false'),
    "a file": ({"input": [user([{"type": "input_file", "file_id": "f"}])]}, "input[0].content[0]: 'input_file'"),
    "a role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0]: 'tool' is not a valid role"),
    "items that are none": ({"input": [7]}, "input[0]: 'None' is not a valid role"),
    "no input": ({"input": None}, "'input' is missing"),
    "tools that are no list": ({"tools": "x"}, "'tools' must be a list"),
})
def test_what_a_response_can_not_be_is_named(fields, words, a, b, pool):
    got = ask(pool(a), "POST", "/v1/responses", {**WANTED, **fields})
    assert got.status == 400 and words in got.json["error"]["message"] and not a.bodies()
    server = pool(FakeOpenAI(), (b.sends(reply(body=b'{"id":"resp_2"}')), {"paths": ["/v1/responses*"]}))
    assert ask(server, "POST", "/v1/responses", {**WANTED, **fields}).json == {"id": "resp_2"} and b.bodies() == [{**WANTED, **fields}]


def test_the_events_of_a_response(fake, pool):
    body = ask(pool(fake.faulting(ALL_KINDS)), "POST", "/v1/responses", {**WANTED, "stream": True, "include": ["reasoning.encrypted_content"]}).body
    events = named_events(body)
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    kinds = [event["type"].replace("response.", "") for event in events]
    assert kinds == ["created", "in_progress", "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta", "reasoning_summary_text.done",
                     "reasoning_summary_part.done", "output_item.done", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
                     "output_text.done", "content_part.done", "output_item.done", "output_item.added", "function_call_arguments.delta",
                     "function_call_arguments.done", "output_item.done", "completed"]
    response = events[-1]["response"]
    assert response["id"] == events[0]["response"]["id"] and response["status"] == "completed"
    assert response["output"] == [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert response["usage"] == {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18, "input_tokens_details": {
        "cached_tokens": 4, "cache_write_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    message = response["output"][1]
    assert events[8]["item"] == {**message, "status": "in_progress", "content": []} and events[8]["output_index"] == 1
    location = {"item_id": message["id"], "output_index": 1, "content_index": 0}
    assert events[9:14] == [
        {"type": "response.content_part.added", **location, "part": {**message["content"][0], "text": ""}},
        *({"type": "response.output_text.delta", **location, "delta": text, "logprobs": []} for text in ("Hi", " you")),
        {"type": "response.output_text.done", **location, "text": "Hi you", "logprobs": []},
        {"type": "response.content_part.done", **location, "part": {"type": "output_text", "text": "Hi you", "annotations": [], "logprobs": []}}]
    call = response["output"][2]
    assert call == {"id": call["id"], "type": "function_call", "status": "completed", "call_id": "call_1", "name": "f", "arguments": '{"a":1}'}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_blocks_never_interleave_though_calls_do(path, fake, pool):
    parts = [(0, "z", "e", "[0]"), (1, "a", "f", ""), (0, None, None, " "), (1, None, None, '{"x"'), (2, "b", "g", ""), (1, None, None, ":1}"),
             (2, None, None, '{"y":'), None, (3, None, "h", ""), (2, None, None, "2}"), (1, None, None, " ")]
    fake.faults.append(answered(*(calls(part) if part else {"content": "so"} for part in parts), finish="tool_calls"))
    events = named_events(ask(pool(fake), "POST", path, {**WANTS[path], "stream": True}).body)
    added = [event for event in events if event["type"] in ("content_block_start", "response.output_item.added")]
    blocks = [event.get("content_block") or event.get("item") for event in added]
    assert [block.get("call_id", block.get("id")) for block in blocks][:3] == ["z", "a", "b"] and [block.get("name") for block in blocks] == ["e", "f", "g", None, "h"]
    assert re.match("call_.", blocks[4].get("call_id", blocks[4]["id"])), "it needs one, even if the upstream gave none"
    pieces_of = collections.defaultdict(str)
    for event in events:
        delta = event.get("delta")
        if event["type"].endswith("delta") and "stop_reason" not in delta:
            pieces_of[event.get("index", event.get("output_index"))] += delta if isinstance(delta, str) else delta.get("partial_json", delta.get("text"))
    assert pieces_of == {0: "[0]", 1: '{"x":1}', 2: '{"y":2}', 3: "so"}
    opened = None
    for event in events:
        index = event.get("index", event.get("output_index"))
        assert index is None or opened in (None, index)
        opened = None if event["type"] in ("content_block_stop", "response.output_item.done") else index


def test_a_response_that_fails_within(a, pool):
    events = named_events(ask(pool(a.faulting(a.cut(1))), "POST", "/v1/responses", {**WANTED, "stream": True}).body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-2]["type"] == "error" and events[-2]["message"] == events[-2]["error"]["message"] == events[-1]["response"]["error"]["message"]
    assert events[-1]["type"] == "response.failed" and events[-1]["response"]["status"] == "failed"
    own = pool((a, {"paths": ["/v1/responses"]}))
    for frames, failed in ((b'data: {"type":"response.output_text.delta"}\n\n', True), (b'data: {"type":"response.completed"}\n\n', False)):
        a.sends(a.head() + chunks(frames))
        body = ask(own, "POST", "/v1/responses", {**WANTED, "stream": True}).body
        assert body.startswith(frames) and (b"response.failed" in body) == failed and b"event: response.created" not in body


def test_pings_and_failures_before_the_first_event():
    message, response = akashproxy.Messages(ASKED), akashproxy.Responses(WANTED)
    assert {form: message.ping_frame(form) for form in ("comment", "chunk", "off")} == {
        "comment": b'event: ping\ndata: {"type":"ping"}\n\n', "chunk": b'event: ping\ndata: {"type":"ping"}\n\n', "off": b""}
    assert (response.ping_frame("comment"), response.ping_frame("off")) == (b": ping\n\n", b"")
    error = APIError(502, "no", code="upstream_error")
    assert [event["type"] for event in named_events(message.error_frames(error))] == ["error"]
    assert [event["type"] for event in named_events(response.error_frames(error))] == ["response.created", "response.in_progress", "error", "response.failed"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_call_that_waits_is_not_lost_when_the_stream_breaks_off(path, fake, pool):
    frames = [fake.event(calls((at, f"c{at}", "f", '{"a":'))) for at in (0, 1)]
    body = ask(pool(fake.sends(fake.head() + b"".join(map(chunk, frames)))), "POST", path, {**WANTS[path], "stream": True}).body
    assert b'"c0"' in body and b'"c1"' in body and b"broke off" in body


def test_responses_are_not_stored(a, pool):
    server = pool(a)
    for method in ("GET", "DELETE"):
        got = ask(server, method, "/v1/responses/resp_1")
        assert got.status == 404 and "not stored" in got.json["error"]["message"]
    assert ask(server, "POST", "/v1/responses/compact", {"model": "both"}).status == 404 and a.requests[-1].path == "/v1/responses/compact"
    asked = len(a.requests)
    assert ask(server, "POST", "/v1/responses/../x", {"model": "both"}).status == 405 and len(a.requests) == asked


ODD = [None, True, 0, -1.5, "", "x", [], {}, [None], ["x"], [7], [[]], [{}], {"type": 7}, {"type": "function"}, {"type": ["x"]}, [text_part(7)],
       [{"type": "image", "source": 7}], [{"type": "image", "source": PNG_SOURCE}], [{"type": "image_url", "image_url": 7}], [{"type": "tool_result", "content": {}}], [{"type": "tool_use"}],
       [user({})], [{"role": "assistant", "content": [{"type": "hologram"}], "tool_calls": 7}], [user([{"type": {}}])],
       [{"role": "tool", "content": 7}], [{"type": "function_call"}], [{"type": "function_call_output"}], [{"role": ["user"], "content": "x"}]]


def test_odd_values_are_answered_or_named_never_a_bug():
    seen = collections.Counter()
    controllers = [akashproxy.CONTROLLERS[kind](akashproxy.ControllerSettings(type=kind, speed=0.0), Settings()) for kind in ("akash", "echo")]
    for dialect, body in ((akashproxy.ChatCompletions, CHAT), (akashproxy.Messages, ASKED), (akashproxy.Responses, WANTED)):
        names = [*body, "system", "instructions", "tools", "tool_choice", "thinking", "reasoning", "text", "metadata", "output_config", "stop", "stop_sequences", "max_tokens", "temperature"]
        nested = [("messages", [{"role": role, "content": odd}] * 2) for role in ("user", "assistant", "system") for odd in ODD]
        for name, odd in [(name, odd) for name in names for odd in ODD] + nested:
            for controller in controllers:
                try:
                    spoken = dialect({**body, name: odd})
                    error = controller.check_support(spoken.call)
                    if error is None and controller is controllers[1]:
                        spoken.opening_frames() + spoken.encode(list(controller.events(spoken.call))) + akashproxy.to_json(spoken.response_body(fold(map(spoken.count, [Text("x"), Finish("stop")]))))
                except APIError as refused:
                    error = refused
                seen[error and error.status] += 1
                assert error is None or error.status in (400, 404) and error.message, (name, odd)
    assert seen[None] > 500 and seen[400] > 500


# -- The history of a conversation: nothing is lost on the way to a chat, and nothing is sent that models refuse

PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"}}
PDF_FILE = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0xLjQK"}
PDF_NOTE = "[A PDF of 9 bytes, which this model can't read.]"
USES = assistant([{"type": "tool_use", "id": "t1", "name": "f", "input": {}}])
USES_TWICE = assistant([*USES["content"], {**USES["content"][0], "id": "t2"}])
CALLED_TWICE = called(("t1", "f", "{}"), ("t2", "f", "{}"))
CALLED_T1, GOT = called(("t1", "f", "{}")), returned("t1", "1")


def thinking(text, **fields):
    return {"type": "thinking", "thinking": text, "signature": "", **fields}


def result(content="1", id="t1", **fields):
    return {"type": "tool_result", "tool_use_id": id, "content": content, **fields}


def items_of(got):
    """The blocks of a message, or the output of a response, which may be streamed."""
    events = named_events(got.body) if got.json is None else []
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert not done or done == events[-1]["response"]["output"]
    return [event["content_block"] for event in events if "content_block" in event] or done or got.json.get("content") or got.json["output"]


def with_results(path, items):
    """What a client sends to go on: what it was answered, and the results of the calls in it."""
    if path == "/v1/messages":
        return {"messages": [assistant(items), user([result("1", item["id"]) for item in items if item["type"] == "tool_use"])]}
    return {"input": [*items, *({**OUTPUT_ITEM, "call_id": item["call_id"]} for item in items if item["type"] == "function_call")]}


@table({
    # name: (messages, messages of the chat)
    "a system message in the middle": ([user("x"), system("B"), user("y")], [system("B"), user("x"), user("y")]),
    "several of them, one behind results": ([system("A"), user("x"), USES, user([result()]), system("B"), user("y"), system([text_part("C")])],
                                            [system("A\n\nB\n\nC"), user("x"), CALLED_T1, GOT, user("y")]),
    "reasoning beside a call": ([{**USES, "content": [thinking("hmm"), *USES["content"]]}, user([result()])], [{**CALLED_T1, "reasoning_content": "hmm"}, GOT]),
    "two pieces of it, and text": ([{**USES, "content": [thinking("a"), text_part("t"), thinking("b", signature="s"), *USES["content"]]}, user([result()])],
                                   [{**CALLED_T1, "content": "t", "reasoning_content": "a\n\nb"}, GOT]),
    "reasoning in a message before the call": ([assistant([thinking("hmm")]), USES, user([result()])], [{**CALLED_T1, "reasoning_content": "hmm"}, GOT]),
    "reasoning without a call": ([assistant([thinking("hmm"), text_part("t")]), user("y")], [assistant("t"), user("y")]),
    "a summary in place of what was said": ([assistant([{"type": "compaction", "content": "S", "encrypted_content": "E"}]), user("y")], [assistant("S"), user("y")]),
    "no summary": ([assistant([{"type": "compaction", "content": None}]), user("y")], [user("y")]),
    "pictures in its text": ([assistant(f"a ![]({DATA_URL})![b](data:x) ![](http://c/d)"), user([text_part(f"[c](d) ![]({DATA_URL}")])],
                             [assistant("a [An image is left out.]![b](data:x) ![](http://c/d)"), user(f"[c](d) ![]({DATA_URL}")]),
    "redacted and empty reasoning": ([{**USES, "content": [{"type": "redacted_thinking", "data": "x"}, thinking(""), *USES["content"]]}, user([result()])], [CALLED_T1, GOT]),
    "a call without a result": ([USES, user("stop")], [CALLED_T1, no_result("t1"), user("stop")]),
    "one of two": ([USES_TWICE, user([result("2", "t2")])], [CALLED_TWICE, no_result("t1"), returned("t2", "2")]),
    "results in the other order": ([USES_TWICE, user([result("2", "t2"), result()])], [CALLED_TWICE, GOT, returned("t2", "2")]),
    "a result behind another message": ([USES, user("wait"), user([result()])], [CALLED_T1, GOT, user("wait")]),
    "a result before its call": ([user([result()]), USES], [CALLED_T1, GOT]),
    "a result without a call": ([user([result("1", "t9")]), assistant("ok")], [user("[Result of an unknown tool call]\n1"), assistant("ok")]),
    "results without IDs": ([USES_TWICE, user([result("1", None), result("2", None)])], [CALLED_TWICE, GOT, returned("t2", "2")]),
    "a call and a result without an ID": ([{**USES, "content": [{**USES["content"][0], "id": None}]}, user([result("1", None)])],
                                          [called(("call_0", "f", "{}")), returned("call_0", "1")]),
    "two results of one call": ([USES, user([result("1"), result("2")])], [CALLED_T1, returned("t1", "1\n\n2")]),
    "an ID that comes again": ([USES, user([result("1")]), USES, user([result("2")])], [CALLED_T1, GOT, CALLED_T1, returned("t1", "2")]),
    "an ID that comes again after an interruption": ([USES, user("stop"), USES, user([result("2")])], [CALLED_T1, no_result("t1"), user("stop"), CALLED_T1, returned("t1", "2")]),
    "a failure": ([USES, user([result("no such file", is_error=True)])], [CALLED_T1, returned("t1", "Error: no such file")]),
    "a failure that says so": ([USES, user([result("Error: no", is_error=True)])], [CALLED_T1, returned("t1", "Error: no")]),
    "a failure without words": ([USES, user([result(None, is_error=True)])], [CALLED_T1, returned("t1", "Error: the tool failed.")]),
    "a PDF in a result": ([USES, user([result([PDF])])], [CALLED_T1, returned("t1", PDF_NOTE)]),
    "a PDF in the first of two messages": ([user([PDF]), user("y")], [user(PDF_NOTE), user("y")]),
    "a PDF beside a result": ([USES, user([result(), PDF])], [CALLED_T1, GOT, user(PDF_NOTE)]),
    "a PDF in an earlier message": ([user([PDF, text_part("x")]), assistant("ok"), user("y")],
                                    [user(PDF_NOTE + "\n\nx"), assistant("ok"), user("y")]),
    "a PDF at a URL": ([USES, user([result([{"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}}])])],
                       [CALLED_T1, returned("t1", "[A PDF, which this model can't read.]")]),
    "another file in a result": ([USES, user([result([{"type": "resource", "resource": {"mimeType": "application/zip", "blob": "UEsDBA=="}}])])],
                                 [CALLED_T1, returned("t1", "[A file of 4 bytes, which this model can't read.]")]),
    "a film in a result": ([USES, user([result([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAAHA=="}}])])],
                           [CALLED_T1, returned("t1", "[A file of 4 bytes, which this model can't read.]")]),
    "sound in a list within a result": ([USES, user([result([{"type": "resource", "contents": [{"mimeType": "audio/wav", "blob": "UklGRg=="}]}])])],
                                        [CALLED_T1, returned("t1", "[A file of 4 bytes, which this model can't read.]")]),
    "an unknown block in a history": ([user([{"type": "hologram"}]), assistant("ok")],
                                      [user("[A block of type 'hologram' is left out.]"), assistant("ok")]),
    "empty blocks": ([system([text_part("")]), user([text_part(""), text_part("x")])], [user("x")]),
    "text as a document": ([user([{"type": "document", "title": "T", "context": "C", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
                                   {"type": "document", "source": {"type": "content", "content": [text_part("a"), text_part("b")]}}])], [user("T\n\nC\n\nwords\n\na\n\nb")]),
    "results of a search": ([user([{"type": "search_result", "source": "http://s", "title": "T", "content": [text_part("found")]}])], [user("T\n\nhttp://s\n\nfound")]),
})
def test_a_history_of_messages_as_a_chat(messages, expected, fake, pool):
    assert ask(pool(fake), "POST", "/v1/messages", {**ASKED, "messages": messages}).status == 200
    assert fake.bodies()[0]["messages"] == expected


def reasoned(*texts, **fields):
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": text} for text in texts], **fields}


CALL_ITEM, OUTPUT_ITEM = {**CALLED, "arguments": "{}"}, {"type": "function_call_output", "call_id": "c1", "output": "1"}
C1, C1_C2, R1 = called(("c1", "f", "{}")), called(("c1", "f", "{}"), ("c2", "f", "{}")), returned("c1", "1")
DEVELOPER, SAYS = developer("B"), assistant("doing")


@table({
    # name: (input, messages of the chat)
    "a developer in the middle": ([user("x"), DEVELOPER, user("y")], [system("B"), user("x"), user("y")]),
    "reasoning beside a call": ([reasoned("a", "b"), CALL_ITEM, OUTPUT_ITEM], [{**C1, "reasoning_content": "a\n\nb"}, R1]),
    "reasoning, text and a call": ([reasoned("a"), SAYS, CALL_ITEM, OUTPUT_ITEM], [{**C1, "content": "doing", "reasoning_content": "a"}, R1]),
    "reasoning in full": ([reasoned("short", content=[{"type": "reasoning_text", "text": "long"}]), CALL_ITEM, OUTPUT_ITEM], [{**C1, "reasoning_content": "long"}, R1]),
    "reasoning between calls": ([CALL_ITEM, reasoned("a"), {**CALL_ITEM, "call_id": "c2"}, OUTPUT_ITEM, {**OUTPUT_ITEM, "call_id": "c2"}],
                                [{**C1_C2, "reasoning_content": "a"}, R1, returned("c2", "1")]),
    "reasoning without a call": ([reasoned("a"), SAYS, user("y")], [SAYS, user("y")]),
    "reasoning that nothing follows": ([user("x"), reasoned("a"), user("y")], [user("x"), user("y")]),
    "the assistant's text between": ([user("x"), CALL_ITEM, SAYS, OUTPUT_ITEM], [user("x"), {**C1, "content": "doing"}, R1]),
    "the user's between": ([CALL_ITEM, user("x"), OUTPUT_ITEM], [C1, R1, user("x")]),
    "a developer's between": ([CALL_ITEM, DEVELOPER, OUTPUT_ITEM], [system("B"), C1, R1]),
    "all of them": ([CALL_ITEM, user("x"), SAYS, DEVELOPER, OUTPUT_ITEM], [system("B"), C1, R1, user("x"), SAYS]),
    "calls in turns": ([CALL_ITEM, OUTPUT_ITEM, {**CALL_ITEM, "call_id": "c2"}, {**OUTPUT_ITEM, "call_id": "c2"}],
                       [C1, R1, called(("c2", "f", "{}")), returned("c2", "1")]),
    "no output": ([CALL_ITEM, user("go on")], [C1, no_result("c1"), user("go on")]),
    "an output before its call": ([OUTPUT_ITEM, CALL_ITEM], [C1, R1]),
    "an output of nothing known": ([OUTPUT_ITEM], [user("[Result of an unknown tool call]\n1")]),
    "outputs without IDs": ([CALL_ITEM, {**CALL_ITEM, "call_id": "c2"}, {**OUTPUT_ITEM, "call_id": None}, {**OUTPUT_ITEM, "call_id": None, "output": "2"}],
                            [C1_C2, R1, returned("c2", "2")]),
    "arguments as an object": ([{**CALL_ITEM, "arguments": {"a": 1}}, OUTPUT_ITEM], [called(("c1", "f", '{"a":1}')), R1]),
    "arguments that were cut off": ([{**CALL_ITEM, "arguments": '{"a":'}, OUTPUT_ITEM], [called(("c1", "f", '{"arguments":"{\\"a\\":"}')), R1]),
    "arguments that are no object": ([{**CALL_ITEM, "arguments": "[1]"}, OUTPUT_ITEM], [called(("c1", "f", '{"arguments":"[1]"}')), R1]),
    "no arguments": ([{**CALL_ITEM, "arguments": ""}, OUTPUT_ITEM], [C1, R1]),
    "a custom tool": ([{"type": "custom_tool_call", "call_id": "c1", "name": "f", "input": "a\n"}, {"type": "custom_tool_call_output", "call_id": "c1", "output": "1"}],
                      [called(("c1", "f", '{"input":"a\\n"}')), R1]),
    "a shell": ([{"type": "local_shell_call", "call_id": "c1", "action": {"command": ["ls"]}}, {"type": "local_shell_call_output", "call_id": "c1", "output": "1"}],
                [called(("c1", "local_shell", '{"command":["ls"]}')), R1]),
    "a patch": ([{"type": "apply_patch_call", "call_id": "c1", "operation": {"path": "a"}}, {"type": "apply_patch_call_output", "call_id": "c1", "output": "1"}],
                [called(("c1", "apply_patch", '{"path":"a"}')), R1]),
    "a patch that failed": ([{"type": "apply_patch_call", "call_id": "c1", "operation": {}}, {"type": "apply_patch_call_output", "call_id": "c1", "status": "failed", "output": "no"}],
                            [called(("c1", "apply_patch", "{}")), returned("c1", "Error: no")]),
    "a screenshot": ([{"type": "computer_call", "call_id": "c1", "action": {}}, {"type": "computer_call_output", "call_id": "c1", "output": {"type": "computer_screenshot", "image_url": "data:x"}}],
                     [called(("c1", "computer", "{}")), returned("c1", ""), user([{"type": "image_url", "image_url": {"url": "data:x"}}])]),
    "a message of another agent": ([{"type": "agent_message", "author": "/root", "recipient": "/root/a", "content": [{"type": "input_text", "text": "Payload:"}, {"type": "encrypted_content", "encrypted_content": "go"}]}],
                                   [user("Payload:\n\ngo")]),
    "an encrypted one": ([user("x"), {"type": "agent_message", "content": [{"type": "encrypted_content", "encrypted_content": "gAAAAABx"}]}],
                         [user("x"), user("[A block of type 'encrypted_content' is left out.]")]),
    "an encrypted summary": ([{"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAAABx"}, user("x")], [user("x")]),
    "a search on the server": ([user("x"), {"type": "web_search_call", "id": "ws_1", "action": {"type": "search"}}, user("y")], [user("x"), user("y")]),
    "a PDF in an output": ([CALL_ITEM, {**OUTPUT_ITEM, "output": [PDF_FILE]}], [C1, returned("c1", PDF_NOTE)]),
    "a PDF in the first of two messages": ([user([PDF_FILE]), system("B"), user("y")], [system("B"), user(PDF_NOTE), user("y")]),
    "a PDF in an earlier message": ([user([PDF_FILE]), SAYS, user("y")], [user(PDF_NOTE), SAYS, user("y")]),
    "an image in the form of a chat": ([user([{"type": "image_url", "image_url": {"url": "data:x"}}])], [user([{"type": "image_url", "image_url": {"url": "data:x"}}])]),
    "how closely to look": ([user([{"type": "input_image", "image_url": "data:x", "detail": "high"}])],
                            [user([{"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}])]),
})
def test_a_history_of_responses_as_a_chat(items, expected, fake, pool):
    assert ask(pool(fake), "POST", "/v1/responses", {**WANTED, "input": items}).status == 200
    assert fake.bodies()[0]["messages"] == expected


def reminder(text):
    return f"<system-reminder>\n{text}\n</system-reminder>"


@table({
    # name: (messages, messages of the chat)
    "after the user's": ([system("A"), user("x"), system("B")], [system("A"), user(f"x\n\n{reminder('B')}")]),
    "before the user's": ([user("x"), assistant("a"), system("B"), user("y")], [user("x"), assistant("a"), user(f"{reminder('B')}\n\ny")]),
    "behind a result": ([system("A"), system("B"), USES, user([result()]), system("C")], [system("A\n\nB"), CALLED_T1, GOT, user(reminder("C"))]),
    "beside a picture": ([user([{"type": "image", "source": PNG_SOURCE}]), system("B")], [user([picture("data:image/png;base64,iVBO"), text_part(reminder("B"))])]),
})
def test_later_system_messages_as_text_of_the_user(messages, expected, fake, pool):
    assert ask(pool((fake, {"system_messages": "user"})), "POST", "/v1/messages", {**ASKED, "messages": messages}).status == 200
    assert fake.bodies()[0]["messages"] == expected


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("extra", [{"extra_content": {"google": {"thought_signature": "S/+=\u2028" * 99}}}, {"provider_specific_fields": {"thought_signature": "S"}},
                                   {"thought_signature": "S", "n": 1}], ids=["Gemini", "LiteLLM", "others"])
def test_what_a_model_wants_back_with_a_call_comes_back(extra, path, streamed, fake, pool):
    server, first = pool(fake), calls((0, "c1", "f", '{"a":'))
    first["tool_calls"][0].update({**extra, "empty": None})
    fake.faults.append(answered(first, calls((0, None, None, "1}")), calls((1, "c2", "f", "{}")), finish="tool_calls"))
    items = items_of(ask(server, "POST", path, {**WANTS[path], "stream": streamed}))
    ids = [item.get("call_id", item["id"]) for item in items]
    assert re.fullmatch("[A-Za-z0-9_-]+", ids[0]) and ids[1] == "c2"
    if path == "/v1/messages":
        items[0]["input"] = {"a": 1}        # in a stream its events tell it
    assert ask(server, "POST", path, {**WANTS[path], **with_results(path, items)}).status == 200
    sent = called(("c1", "f", '{"a":1}'), ("c2", "f", "{}"))
    sent["tool_calls"][0].update(extra)
    assert fake.bodies()[-1]["messages"] == [sent, R1, returned("c2", "1")]


@pytest.mark.parametrize("path, more", [("/v1/messages", {**ASKED, "thinking": {"type": "adaptive"}}),
                                        ("/v1/responses", {**WANTED, "include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}), ("/v1/responses", WANTED)])
def test_clients_that_return_only_signed_reasoning_return_ours(path, more, streamed, fake, pool):
    server = pool(fake.faulting(answered({"reasoning_content": "h"}, {"reasoning_content": "m"}, calls((0, "c1", "f", "{}")), finish="tool_calls")))
    got = ask(server, "POST", path, {**more, "stream": streamed})
    thought, *others = items_of(got)
    if path == "/v1/messages" and streamed:
        signature = "".join(event["delta"].get("signature", "") for event in named_events(got.body) if event["type"] == "content_block_delta")
        thought = {"type": "thinking", "thinking": "hm", "signature": signature}
    assert thought.get("signature", thought.get("encrypted_content")) == (None if more is WANTED else akashproxy.UNSIGNED)
    ask(server, "POST", path, {**more, **with_results(path, [thought, *others])})
    assert got.headers.get("x-akashproxy-ignored") == ("include.message.output_text.logprobs" if "include" in more else None)
    assert fake.bodies()[-1]["messages"][0]["reasoning_content"] == "hm"


def returned_calls(server, path, body, streamed):
    """What an upstream gets back when a client returns an answer's tool calls, and nothing else of it, with their results."""
    items = items_of(ask(server, "POST", path, {**body, "stream": streamed}))
    only = [item for item in items if item["type"] in ("tool_use", "function_call")]
    ids = [item.get("call_id", item["id"]) for item in only]
    assert path == "/v1/messages" or all(re.fullmatch("[A-Za-z0-9_-]{1,40}(__extra_[A-Za-z0-9_-]+)?", id) for id in ids), "others would reject it"
    assert ask(server, "POST", path, {**body, **with_results(path, only)}).status == 200


SIGNED = {"type": "reasoning.text", "text": "why", "signature": "S", "format": "anthropic-claude-v1", "index": 0}
SEALED = {"type": "reasoning.encrypted", "data": "E", "id": "tool_1", "format": "google-gemini-v1", "index": 0}
@table({
    # name: (details of each delta, None for the first call; what comes back beside the calls)
    "signed text in fragments": ([[{**SIGNED, "text": "w", "signature": None}], [{**SIGNED, "text": "hy", "signature": None}], [{**SIGNED, "text": None}]], [SIGNED]),
    "encrypted ones": ([[SEALED], [{**SEALED, "data": "F", "index": 1}]], [SEALED, {**SEALED, "data": "F", "index": 1}]),
    "encrypted ones without an index": ([[{**SEALED, "index": None}], [{**SEALED, "data": "F", "index": None}]], [{**SEALED, "index": None}, {**SEALED, "data": "F", "index": None}]),
    "text and an encrypted one": ([[{"type": "reasoning.text", "text": "why", "index": 0}], [SEALED]], [{"type": "reasoning.text", "text": "why", "index": 0}, SEALED]),
    "text alone": ([[{"type": "reasoning.text", "text": "why", "index": 0}]], None),
    "one for each call": ([[SEALED], None, [{**SEALED, "data": "F"}]], [SEALED, {**SEALED, "data": "F"}]),
    "too many of them": ([[{**SEALED, "data": "E" * 40_000}], [{**SEALED, "data": "F" * 40_000}]], None),
    "odd ones": ([[7], ["x"], [None], {"a": 1}, "x"], None),
})
@pytest.mark.parametrize("path, body", [("/v1/messages", ASKED), ("/v1/responses", WANTED)], ids=["messages", "responses"])
def test_reasoning_details_come_back_with_the_calls(details, expected, path, body, streamed, fake, pool):
    deltas = [calls((0, "c1", "f", "{}")) if each is None else {"reasoning_details": each} for each in (details if None in details else [*details, None])]
    fake.faults.append(answered(*deltas, calls((1, "c2", "f", "{}")), finish="tool_calls"))
    returned_calls(pool(fake), path, body, streamed)
    message = fake.bodies()[-1]["messages"][0]
    assert [call["id"] for call in message["tool_calls"]] == ["c1", "c2"] and not any("reasoning_details" in call for call in message["tool_calls"])
    without_nulls = lambda values: [{name: value for name, value in each.items() if value is not None} for each in values]
    assert without_nulls(message.get("reasoning_details") or []) == without_nulls(expected or [])


@pytest.mark.parametrize("reasoning, expected", [(["h", "m"], "hm"), (["\u4e2d" * 900] * 3, "\u4e2d" * 1000), ([], None)], ids=["short", "long", "none"])
@pytest.mark.parametrize("path, body", [("/v1/messages", ASKED), ("/v1/responses", WANTED)], ids=["messages", "responses"])
def test_reasoning_that_clients_can_not_return_comes_back_with_the_calls(path, body, reasoning, expected, streamed, fake, pool):
    fake.faults.append(answered(*({"reasoning_content": text} for text in reasoning), calls((0, "c1", "f", "{}"), (1, "c2", "f", "{}")), finish="tool_calls"))
    returned_calls(pool(fake), path, body, streamed)
    message = fake.bodies()[-1]["messages"][0]
    assert message["tool_calls"] == C1_C2["tool_calls"]
    assert message.get("reasoning_content") == expected


@pytest.mark.parametrize("path, body", [("/v1/messages", ASKED), ("/v1/responses", WANTED)], ids=["messages", "responses"])
@pytest.mark.parametrize("id, is_kept", [("functions.f:0", True), ("a b", True), ("é", True), ("a" * 40, True), ("a" * 41, False), ("a.b" * 40, False)])
def test_ids_that_other_upstreams_would_reject_are_not_shown(id, is_kept, path, body, streamed, fake, pool):
    returned_calls(pool(fake.faulting(answered(calls((0, id, "f", "{}")), finish="tool_calls"))), path, body, streamed)
    call, result = fake.bodies()[-1]["messages"][:2]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"] and (result["tool_call_id"] == id) == is_kept and len(result["tool_call_id"]) <= 40


CARRIED = akashproxy.id_with_extra("c1", {"reasoning_content": "hm " * 1000})
@pytest.mark.parametrize("changed", [CARRIED, CARRIED[:64], CARRIED[:40], CARRIED.lower()], ids=["whole", "64", "40", "lower"])
@pytest.mark.parametrize("path, sent, expected", [
    ("/v1/chat/completions", [called((CARRIED, "f", "{}")), returned(CARRIED, "1")], [called(("c1", "f", "{}")), returned("c1", "1")]),
    ("/v1/messages", [assistant([thinking("hm", signature=akashproxy.UNSIGNED)]), assistant([thinking("hm", signature=akashproxy.UNSIGNED), text_part("x"), {"type": "tool_use", "id": CARRIED}]),
                      user([result("1", CARRIED), result([], CARRIED)])],
     [assistant([text_part("x"), {"type": "tool_use", "id": "c1"}]), user([result("1", "c1"), result([], "c1")])]),
    ("/v1/responses", [user("x"), {"type": "reasoning", "encrypted_content": akashproxy.UNSIGNED}, {"type": "reasoning", "encrypted_content": "E"}, {"type": "reasoning", "id": "rs_unsigned_1", "summary": []}, {**OUTPUT_ITEM, "call_id": CARRIED}, "x"],
     [user("x"), {"type": "reasoning", "encrypted_content": "E"}, {**OUTPUT_ITEM, "call_id": "c1"}, "x"]),
])
def test_upstreams_with_the_clients_api_get_nothing_that_was_added(path, sent, expected, changed, fake, pool):
    name = "input" if path.endswith("responses") else "messages"
    sent = json.loads(json.dumps(sent).replace(CARRIED, changed))
    ask(pool((fake, {"paths": ["*"]})), "POST", path, {"model": "both", "max_tokens": 9, name: sent})
    if name == "messages" and "tool_calls" in expected[0] and changed == CARRIED:
        expected = [{**expected[0], "reasoning_content": "hm " * 1000}, expected[1]]
    assert fake.bodies()[-1][name] == expected


SIGNATURE = {"extra_content": {"google": {"thought_signature": "S"}}}
@table({
    # name: (what the IDs of two calls contain, further fields of their message, those of the call and of the message as the upstream gets them)
    "the upstream's own ID": (({"id": "functions.f:0"}, None), {}, {"id": "functions.f:0"}, {}),
    "fields of the call": (({**SIGNATURE, "id": "a b"}, None), {}, {**SIGNATURE, "id": "a b"}, {}),
    "reasoning": (({"reasoning_content": "hm", **SIGNATURE}, None), {}, {"id": "c1", **SIGNATURE}, {"reasoning_content": "hm"}),
    "reasoning that the client returns": (({"reasoning_content": "hm"}, None), {"reasoning_content": "mm"}, {"id": "c1"}, {"reasoning_content": "mm"}),
    "details of two calls": (({"reasoning_details": [SEALED]}, {"reasoning_details": [SIGNED]}), {}, {"id": "c1"}, {"reasoning_details": [SEALED, SIGNED]}),
})
def test_a_conversation_begun_in_another_api_goes_on_as_a_chat(extras, fields, call_fields, message_fields, fake, pool):
    ids = [akashproxy.id_with_extra(id, extra) for id, extra in zip(("c1", "c2"), extras)]
    sent = {**called((ids[0], "f", "{}"), (ids[1], "f", "{}")), **fields}
    assert chat(pool(fake), {**BOTH, "messages": [user("x"), sent, returned(ids[0], "1"), returned(ids[1], "2")]}).status == 200
    expected = {**C1_C2, **message_fields, "tool_calls": [{**C1_C2["tool_calls"][0], **call_fields}, C1_C2["tool_calls"][1]]}
    assert fake.bodies()[-1]["messages"] == [user("x"), expected, returned(call_fields["id"], "1"), returned("c2", "2")]


def test_marks_are_looked_for_where_they_stand_only(fake, pool):
    deep = json.loads('{"a":' * 497 + json.dumps(akashproxy.UNSIGNED) + "}" * 497)
    assert chat(pool(fake), {**BOTH, "x": deep}).status == 200 and fake.bodies()[-1]["x"] == deep


@pytest.mark.parametrize("id", ["c1", "", "__extra_", "c__extra_x", "c__extra_bnVsbA", "c__extra_é", "c__extra_" + "W" * 4000])
def test_an_id_that_carries_nothing_stays_as_it_is(id):
    call_id, extra = akashproxy.split_extra(id)
    assert (call_id or "", extra) in ((id, None), ("c", None))
    assert akashproxy.id_with_extra("c1", {"a": "x" * 70000}) == akashproxy.id_with_extra("c1", None) == "c1"


@pytest.mark.parametrize("calls, is_accepted", [(3, True), (12, False)])
def test_values_in_ids_are_limited_as_those_of_a_body(calls, is_accepted):
    id = akashproxy.id_with_extra("c", {"a": [[]] * 10_000})
    chat_calls = called(*[(id, "f", "{}")] * calls)
    with contextlib.nullcontext() if is_accepted else pytest.raises(APIError, match="IDs of tool calls contain"):
        akashproxy.ChatCompletions({**BOTH, "messages": [chat_calls]})
    blocks = [{"type": "tool_use", "id": id, "name": "f", "input": {}}] * calls
    call = akashproxy.Messages({**ASKED, "messages": [{"role": "assistant", "content": blocks}]}).call
    assert (call.translation_error is None) == is_accepted
    assert is_accepted or call.translation_error.status == 400 and "more than 100000 values" in call.translation_error.message
    assert akashproxy.split_extra("c__extra_" + "e30" + "=" * 70_000)[1] is None


LONG = "mcp__plugin_some_marketplace_and_a_server_with_a_long_name__a_tool_with_a_long_name"


CLOSED = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("schema, strict", [({"type": "string"}, True), (CLOSED, True), ({"$defs": {"x": CLOSED}, "anyOf": [CLOSED, {"type": "null"}]}, True), ({**CLOSED, "required": []}, False),
                                            ({**CLOSED, "additionalProperties": True}, False), ({"anyOf": [CLOSED, {**CLOSED, "required": ["b"]}]}, False), ({"allOf": [CLOSED]}, False), (None, True)])
def test_schemas_that_openai_accepts_as_strict(schema, strict):
    sent = akashproxy.Messages({**ASKED, "output_config": {"format": {"type": "json_schema", "schema": schema}}}).call.body["response_format"]["json_schema"]
    assert sent["strict"] == strict and sent.get("schema") == schema


@table({
    # name: (the client's name, its namespace or None, pattern of the name that is sent)
    "a usual one": ("f", None, "f"),
    "of 64 characters": ("f" * 64, None, "f{64}"),
    "of 83": (LONG, None, LONG[:55] + "_[0-9a-f]{8}"),
    "with other characters": ("a.b/c é", None, "a_b_c___[0-9a-f]{8}"),
    "in a namespace": ("f", "mcp__x", "mcp__x__f"),
    "in one that ends with underscores": ("f", "mcp__x__", "mcp__x__f"),
    "in a long one": ("f", LONG, LONG[:55] + "_[0-9a-f]{8}"),
})
def test_names_of_tools_are_sent_as_upstreams_take_them(name, space, pattern, streamed, fake, pool):
    server = pool(fake)
    one = {"type": "function", "name": name, "parameters": {"required": []}}
    tools = [{"type": "namespace", "name": space, "tools": [one, {"type": "mcp", "name": "c"}]}] if space else [one]
    call = {**CALL_ITEM, "name": name, **({"namespace": space} if space else {})}
    body = {**WANTED, "tools": tools, "input": [call, OUTPUT_ITEM], "tool_choice": {"type": "function", "name": name, **({"namespace": space} if space else {})}}
    assert ask(server, "POST", "/v1/responses", body).status == 200
    sent = fake.bodies()[0]
    used = sent["tools"][0]["function"]["name"]
    assert re.fullmatch(pattern, used) and len(sent["tools"]) == 1 and sent["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}, "required": []}
    assert sent["messages"][0]["tool_calls"][0]["function"]["name"] == used == sent["tool_choice"]["function"]["name"]
    fake.faults.extend([answered(calls((0, "c1", used, "{}")), finish="tool_calls")] * 2)
    item, = items_of(ask(server, "POST", "/v1/responses", {**body, "stream": streamed}))
    assert (item["name"], item.get("namespace")) == (name, space)
    if not space:
        block, = items_of(ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed, "tools": [{"name": name}], "messages": [user("x")]}))
        assert block["name"] == name and fake.bodies()[-1]["tools"][0]["function"]["name"] == used


@pytest.mark.parametrize("arguments, expected", [('{"input":"a\\u00e9\\n"}', "a\u00e9\n"), ('{"patch":"a"}', "a"), ('{"input":"a","x":1}', '{"input":"a","x":1}'), ('{"input":"a', '{"input":"a'), ("a", "a"), ("{}", "")])
def test_calls_of_custom_tools(arguments, expected, streamed, fake, pool):
    calls = [{"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "n__c", "arguments": arguments[:5]}}]},
             {"tool_calls": [{"index": 0, "function": {"arguments": arguments[5:]}}]}]
    fake.faults.append(answered(*calls, {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "f", "arguments": "{}"}}]}, finish="tool_calls"))
    tools = [{"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "c"}]}, {"type": "function", "name": "f"}]
    got = ask(pool(fake), "POST", "/v1/responses", {**WANTED, "stream": streamed, "tools": tools})
    custom, function = (named_events(got.body)[-1]["response"] if streamed else got.json)["output"]
    assert custom == {"id": custom["id"], "type": "custom_tool_call", "status": "completed", "call_id": "c1", "name": "c", "namespace": "n", "input": expected}
    assert (function["type"], function["name"]) == ("function_call", "f")
    if streamed:
        events = [event for event in named_events(got.body) if event.get("output_index") == 0]
        place = {"item_id": custom["id"], "output_index": 0}
        assert [{name: value for name, value in event.items() if name != "sequence_number"} for event in events] == [
            {"type": "response.output_item.added", "output_index": 0, "item": {**custom, "status": "in_progress", "input": ""}},
            {"type": "response.custom_tool_call_input.delta", **place, "delta": expected}, {"type": "response.custom_tool_call_input.done", **place, "input": expected},
            {"type": "response.output_item.done", "output_index": 0, "item": custom}]


def test_equal_names_in_namespaces_stay_apart(fake, pool):
    server = pool(fake)
    f = {"type": "function", "name": "f", "parameters": {}}
    tools = [f, {**f, "name": "a__f"}, {"type": "namespace", "name": "a", "tools": [f]}, {"type": "namespace", "name": "b", "tools": [f]}]
    assert ask(server, "POST", "/v1/responses", {**WANTED, "tools": tools}).status == 200
    names = [one["function"]["name"] for one in fake.bodies()[0]["tools"]]
    assert names[:2] == ["f", "a__f"] and names[3] == "b__f" and len(set(names)) == 4
    fake.faults.append(answered(*(calls((at, f"c{at}", one, "{}")) for at, one in enumerate(names)), finish="tool_calls"))
    output = ask(server, "POST", "/v1/responses", {**WANTED, "tools": tools}).json["output"]
    assert [(item["name"], item.get("namespace")) for item in output] == [("f", None), ("a__f", None), ("f", "a"), ("f", "b")]


ONLY_CHAT = {"paths": ["/v1/chat/completions"]}
PARAMETERS = {
    # name: (path, fields of a body, names and values that are sent, names that are not, what is ignored)
    "no stop sequences, which OpenAI rejects": ("messages", {"stop_sequences": []}, {}, ["stop"], None),
    "a user of 64 characters": ("messages", {"metadata": {"user_id": "u" * 64}}, {"user": "u" * 64}, [], None),
    "one of 65": ("messages", {"metadata": {"user_id": "u" * 65}}, {}, ["user"], "metadata.user_id"),
    "one that is JSON": ("messages", {"metadata": {"user_id": '{"device_id":"x"}'}}, {}, ["user"], "metadata.user_id"),
    "a line that changes each time": ("messages", {"system": [text_part("x-anthropic-billing-header: cc_version=2; cch=1;"), text_part("A")]},
                                      {"messages": [system("A"), user("hi")]}, [], None),
    "such a line before text": ("messages", {"system": "x-anthropic-billing-header: cc_version=2\nA\nB"}, {"messages": [system("A\nB"), user("hi")]}, [], None),
    "text that speaks of it": ("messages", {"system": "Never send x-anthropic-billing-header: it."}, {"messages": [system("Never send x-anthropic-billing-header: it."), user("hi")]}, [], None),
    "a choice of a skipped tool": ("messages", {"tools": [{"name": "f"}, {"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "tool", "name": "web_search"}},
                                   {"tools": [tool()]}, ["tool_choice"], "web_search_20250305, tool_choice"),
    "a schema of null": ("responses", {"tools": [{"type": "function", "name": "f", "parameters": {"type": None, "properties": None}}]}, {"tools": [tool()]}, [], None),
    "a schema of another type": ("messages", {"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, {"tools": [tool()]}, [], None),
    "choices that a chat has not": ("completions", {"n": 2, "best_of": 3, "logprobs": 5, "suffix": "x", "echo": True, "seed": 1}, {"seed": 1},
                                    ["n", "best_of", "logprobs", "suffix", "echo"], "n, best_of, logprobs, suffix, echo"),
    "those it has": ("completions", {"n": 1, "logprobs": None}, {"n": 1}, [], None),
    "no alternatives, but their number": ("completions", {"logprobs": 1}, {}, ["logprobs"], "logprobs"),
}
THOUGHT = [{"role": "assistant", "content": None, "reasoning_content": "h", "tool_calls": [{**C1["tool_calls"][0], "extra_content": {"x": 1}}]}, R1]


@table({
    # name: (a controller's options, path, fields of a body, names and values that are sent, names that are not, what is ignored)
    "a field of messages": ({"drop": ["reasoning_content"]}, "chat/completions", {"messages": THOUGHT}, {"messages": [{name: value for name, value in THOUGHT[0].items() if name != "reasoning_content"}, R1]}, [], "reasoning_content"),
    "a field of calls": ({"drop": ["extra_content"]}, "chat/completions", {"messages": THOUGHT}, {"messages": [{**C1, "reasoning_content": "h"}, R1]}, [], "extra_content"),
    "reasoning of Messages": ({"drop": ["reasoning_content"]}, "messages", {"messages": [{**USES, "content": [thinking("h"), *USES["content"]]}, user([result()])]},
                              {"messages": [CALLED_T1, GOT]}, [], "reasoning_content"),
    "what we add": ({"drop": ["stream_options"]}, "messages", {"stream": True}, {"stream": True}, ["stream_options"], "stream_options"),
    "what we add to Responses": ({"drop": ["stream_options"]}, "responses", {"stream": True}, {"stream": True}, ["stream_options"], "stream_options"),
    "a new name": ({"rename": {"max_tokens": "max_completion_tokens"}}, "messages", {}, {"max_completion_tokens": 64}, ["max_tokens"], None),
    "a new name, relayed": ({"rename": {"max_tokens": "max_completion_tokens"}}, "chat/completions", {"max_tokens": 5}, {"max_completion_tokens": 5}, ["max_tokens"], None),
    "a new name for nothing": ({"rename": {"max_tokens": "max_completion_tokens"}}, "chat/completions", {}, {}, ["max_tokens", "max_completion_tokens"], None),
    "a fixed value": ({"set": {"reasoning_effort": "low", "n": 1}}, "responses", {"reasoning": {"effort": "high"}}, {"reasoning_effort": "low", "n": 1}, [], None),
    "a fixed value, relayed": ({"set": {"provider": {"order": ["x"]}}}, "chat/completions", {"seed": 3}, {"provider": {"order": ["x"]}, "seed": 3}, [], None),
    **{name: (ONLY_CHAT, *row) for name, row in PARAMETERS.items()},
    "not of a chat": ({"set": {"reasoning_effort": "low"}}, "embeddings", {"input": "x"}, {"input": "x"}, ["reasoning_effort"], None),
    "drop, rename and set in turn": ({"drop": ["a", "c"], "rename": {"a": "b", "d": "c"}, "set": {"d": 4}}, "chat/completions", {"a": 1, "d": 2}, {"c": 2, "d": 4}, ["a", "b"], "a"),
})
def test_a_controller_adapts_requests(options, path, fields, sent, left_out, ignored, fake, pool):
    body = {"chat/completions": BOTH, "messages": ASKED, "responses": WANTED, "completions": {"model": "both", "prompt": "hi"}}.get(path, {"model": "both"})
    got = ask(pool((fake, options)), "POST", f"/v1/{path}", {**body, **fields})
    assert got.status == 200 and got.headers.get("x-akashproxy-ignored") == ignored, got.body
    assert {name: fake.bodies()[0].get(name) for name in sent} == sent and not set(left_out) & set(fake.bodies()[0])


def test_a_short_model_name_is_no_part_of_a_word():
    error = akashproxy.error_from_body("u", 422, {"error": {"message": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9 `inputs` tokens"}}, models=("m", "us"))
    assert (error.status, error.code) == (400, "context_length_exceeded")


@table({
    # name: (status, an upstream's message, how Messages says it)
    "OpenAI": (400, "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens.", "prompt is too long: 9001 tokens > 8192 maximum"),
    "OpenAI's, with an answer": (400, "This model's maximum context length is 4097 tokens. However, you requested 5000 tokens (4000 in the messages, 1000 in the completion).",
                                 "input length and `max_tokens` exceed context limit: 4000 + 1000 > 4097, decrease input length or `max_tokens` and try again"),
    "vLLM": (400, "max_tokens (or max_completion_tokens) is too large: 32000. This model's maximum context length is 32768 tokens and your request has 12193 input tokens "
             "(32000 > 32768 - 12193).", "input length and `max_tokens` exceed context limit: 12193 + 32000 > 32768, decrease input length or `max_tokens` and try again"),
    "llama.cpp": (400, "request (9001 tokens) exceeds the available context size (8192 tokens), try increasing it", "prompt is too long: 9001 tokens > 8192 maximum"),
    "llama.cpp's older one": (500, "the request exceeds the available context size. try increasing the context size", None),
    "SGLang": (400, "Requested token count exceeds the model's maximum context length of 32768 tokens. You requested a total of 44193 tokens: 12193 tokens from the input messages "
               "and 32000 tokens for the completion.", "input length and `max_tokens` exceed context limit: 12193 + 32000 > 32768, decrease input length or `max_tokens` and try again"),
    "TGI": (422, "`inputs` tokens + `max_new_tokens` must be <= 32768. Given: 12193 `inputs` tokens and 32000 `max_new_tokens`",
            "input length and `max_tokens` exceed context limit: 12193 + 32000 > 32768, decrease input length or `max_tokens` and try again"),
    "Gemini": (400, "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).", "prompt is too long: 1200000 tokens > 1048576 maximum"),
    "Mistral": (400, "Prompt contains 40000 tokens and 0 draft tokens, too large for model with 32768 maximum context length", "prompt is too long: 40000 tokens > 32768 maximum"),
    "Moonshot": (400, "Your request exceeded model token limit: 131072 (requested: 140000)", "prompt is too long: 140000 tokens > 131072 maximum"),
    "OpenRouter": (400, "This endpoint's maximum context length is 32768 tokens. However, you requested about 44193 tokens (12193 of text input, 32000 in the output).",
                   "input length and `max_tokens` exceed context limit: 12193 + 32000 > 32768, decrease input length or `max_tokens` and try again"),
    "LM Studio": (400, "The number of tokens to keep from the initial prompt is greater than the context length (n_keep: 9001>= n_ctx: 8192).", "prompt is too long: 9001 tokens > 8192 maximum"),
    "no numbers": (400, "Your input exceeds the context window of this model.", None),
    "Anthropic's own": (400, "prompt is too long: 9001 tokens > 8192 maximum", "prompt is too long: 9001 tokens > 8192 maximum"),
})
def test_a_request_that_is_too_long_is_told_in_each_clients_words(status, message, told, fake, pool):
    server = pool(fake.faulting(*[fake.raw(reply(status, {"error": {"message": message}}, "Content-Type: application/json"))] * 3))
    got = ask(server, "POST", "/v1/messages", ASKED)
    assert got.status == 400 and got.json["error"] == {"type": "invalid_request_error", "message": told or f"prompt is too long: {message}"}
    for path, body in (("chat/completions", CHAT), ("responses", WANTED)):
        got = ask(server, "POST", f"/v1/{path}", body)
        assert got.status == 400 and got.json["error"]["code"] == "context_length_exceeded" and got.json["error"]["message"] == message


@pytest.mark.parametrize("message", ["max_tokens is too large: 64000. This model supports at most 16384 completion tokens", "The image is too large", "tools.0.name: too long"])
def test_other_errors_are_not_told_as_too_long(message, fake, pool):
    fake.sends(reply(400, {"error": {"message": message}}, "Content-Type: application/json"))
    assert ask(pool(fake), "POST", "/v1/messages", ASKED).json["error"]["message"] == message


CITED = {"type": "url_citation", "url_citation": {"title": "T", "start_index": 0, "end_index": 2, "url": "https://x"}}


def test_annotations_in_each_dialect(streamed, fake, pool):
    server, odd = pool(fake), [7, {"type": "file_citation"}, {"type": "url_citation", "url_citation": {"url": None}}]
    says = answered({"annotations": [CITED]}, {"content": "Hi"}, {"annotations": [CITED, *odd]}, calls((0, "c", "f", "{}")), {"annotations": [CITED]}, finish="tool_calls")
    fake.faults += [says] * 2
    got = ask(server, "POST", "/v1/responses", {**WANTED, "stream": streamed})
    message, _ = items_of(got)
    flat = {"type": "url_citation", **CITED["url_citation"]}
    assert message["content"] == [{"type": "output_text", "text": "Hi", "annotations": [flat, flat] if streamed else [flat, flat, flat], "logprobs": []}], "one came too late for a stream"
    if streamed:
        event, = (event for event in named_events(got.body) if "annotation.added" in event["type"])
        assert event == {"type": "response.output_text.annotation.added", "item_id": message["id"], "output_index": 0, "content_index": 0, "annotation_index": 1,
                         "annotation": flat, "sequence_number": event["sequence_number"]}
    got = ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed})
    assert [block["type"] for block in items_of(got)] == ["text", "tool_use"]
    if streamed:
        fake.sends(reply(body={"choices": [{"message": {"content": "Hi", "annotations": [CITED]}, "finish_reason": "stop"}]}), keep=True)
        assert [CITED] in [event["choices"][0]["delta"].get("annotations") for event in sse(chat(server, BOTH, stream=True).body)[:-1]]
    else:
        fake.faults.append(says)
        assert chat(server, BOTH).json["choices"][0]["message"]["annotations"] == [CITED, CITED, CITED]


def test_a_refusal_in_each_dialect(streamed, fake, pool):
    server = pool(fake.faulting(*[answered({"refusal": "I "}, {"refusal": "can't."})] * 3))
    got = ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed})
    assert (named_events(got.body)[-2]["delta"] if streamed else got.json)["stop_reason"] == "refusal"
    assert [block["type"] for block in items_of(got)] == ["text"] and b"can't." in got.body
    got = ask(server, "POST", "/v1/responses", {**WANTED, "stream": streamed})
    message, = items_of(got)
    assert message == {"id": message["id"], "type": "message", "status": "completed", "role": "assistant", "content": [{"type": "refusal", "refusal": "I can't."}]}
    if streamed:
        events = [event for event in named_events(got.body) if "refusal" in event["type"]]
        place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        assert [{name: value for name, value in event.items() if name != "sequence_number"} for event in events] == [
            *({"type": "response.refusal.delta", **place, "delta": text} for text in ("I ", "can't.")), {"type": "response.refusal.done", **place, "refusal": "I can't."}]
    if streamed:
        fake.faults.clear()
        fake.sends(reply(body={"choices": [{"message": {"refusal": "no"}, "finish_reason": "stop"}]}), keep=True)
        assert b'"delta":{"refusal":"no"}' in chat(server, BOTH, stream=True).body
    else:
        message = chat(server, BOTH).json["choices"][0]["message"]
        assert message == {"role": "assistant", "content": None, "refusal": "I can't."}


@pytest.mark.parametrize("reason, expected", {
    # finish_reason: (of Messages, of Messages with a call, status of Responses, its reason)
    "stop": ("end_turn", "tool_use", "completed", None),
    "length": ("max_tokens", "max_tokens", "incomplete", "max_output_tokens"),
    "content_filter": ("refusal", "refusal", "incomplete", "content_filter"),
    "tool_calls": ("end_turn", "tool_use", "completed", None),
    "function_call": ("end_turn", "tool_use", "completed", None),
    "tool_use": ("end_turn", "tool_use", "completed", None),
}.items())
def test_why_an_answer_ended_in_each_dialect(reason, expected, streamed, fake, pool):
    plain, with_call, status, detail = expected
    server = pool(fake.faulting(*(
        answered(delta, finish=reason) for delta in ({"content": "x"}, calls((0, "c", "f", "{}")), {"content": "x"}))))
    for expected in (plain, with_call):
        got = ask(server, "POST", "/v1/messages", {**ASKED, "stream": streamed})
        assert (named_events(got.body)[-2]["delta"] if streamed else got.json)["stop_reason"] == expected
    got = ask(server, "POST", "/v1/responses", {**WANTED, "stream": streamed})
    response = named_events(got.body)[-1]["response"] if streamed else got.json
    assert (response["status"], (response["incomplete_details"] or {}).get("reason")) == (status, detail)


# == tools as text ============================================================================

FUNCTIONS = [tool("weather", city="string", days="integer"), tool("write", path="string", content="string"), tool("now")]
FUNCTIONS[1]["function"]["parameters"]["properties"].update(mode={"anyOf": [{"type": "string"}, {"type": "null"}]}, append={"anyOf": [{"type": "boolean"}, {"type": "null"}]})
LONG = {"content": "it\'s \"x\" </tool_call>\n" * 20}     # it is sent in parts
LONG_CALL = json.dumps({"name": "write", "arguments": LONG})
KYIV = '{"name": "weather", "arguments": {"city": "Kyiv"}}'
IN_KYIV, LVIV = ("weather", {"city": "Kyiv"}), '{"name": "weather", "arguments": {"city": "Lviv"}}'

# One call in each form that chat templates and reports of bugs show. Hermes: NousResearch/Hermes-Function-Calling, Qwen2.5 and Qwen3; its slips:
# NousResearch/hermes-agent#5315 and #22696, minpeter/ai-sdk-tool-call-middleware#298. Tags: Qwen/Qwen3-Coder, zai-org/GLM-4.5. Marks: the
# templates of moonshotai/Kimi-K2-Instruct, deepseek-ai/DeepSeek-V3 and V3.1; meta-llama/llama-models, models/llama3_1/prompt_format.md.
CALL_FORMS = {
    "Hermes": f"<tool_call>\n{KYIV}\n</tool_call>",
    "Hermes in one line": f"<tool_call>{KYIV}</tool_call>",
    "parameters for arguments": '<tool_call>{"name": "weather", "parameters": {"city": "Kyiv"}}</tool_call>',
    "arguments first": '<tool_call>{"arguments": {"city": "Kyiv"}, "name": "weather"}</tool_call>',
    "arguments as a string": '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Kyiv\\"}"}</tool_call>',
    "OpenAI's object": '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyiv"}}}</tool_call>',
    "a list of one": f"<tool_call>[{KYIV}]</tool_call>",
    "a Markdown fence": f"<tool_call>\n```json\n{KYIV}\n```\n</tool_call>",
    "single quotes and a trailing comma": "<tool_call>{'name': 'weather', 'arguments': {'city': 'Kyiv',},}</tool_call>",
    "Llama's function tag": '<function=weather>{"city": "Kyiv"}</function>',
    "Llama's python tag": '<|python_tag|>{"name": "weather", "parameters": {"city": "Kyiv"}}<|eom_id|>',
    "Qwen3-Coder": "<tool_call>\n<function=weather>\n<parameter=city>\nKyiv\n</parameter>\n</function>\n</tool_call>",
    "Qwen3-Coder without the outer tag": "<function=weather>\n<parameter=city>\nKyiv\n</parameter>\n</function>",
    "GLM-4.5": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Kyiv</arg_value>\n</tool_call>",
    "Kimi K2, with blanks and another name of the section": '<|tool_call_section_begin|> <|tool_call_begin|>\nweather:12 <|tool_call_argument_begin|> '
                                                            '{\n  "city": "Kyiv"\n} <|tool_call_end|> <|tool_call_section_end|>',
    "GLM-4.7": "<tool_call>weather<arg_key>city</arg_key><arg_value>Kyiv</arg_value></tool_call>",
    "Llama's function tag without its end": '<function=weather{"city": "Kyiv"}</function>',
    "Kimi K2": '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Kyiv"}'
               "<|tool_call_end|><|tool_calls_section_end|>",
    "DeepSeek-V3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
                   '{"city": "Kyiv"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "DeepSeek-V3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Kyiv"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}
TOOL_ANSWERS = {    # an answer: its text, its calls
    **{form: (call, "", [IN_KYIV]) for form, call in CALL_FORMS.items()},
    **{f"{form}, after text": (f"I look. {call}", "I look. ", [IN_KYIV]) for form, call in CALL_FORMS.items()},
    **{f"{form}, twice": (f"{call}\n{call}\n", "", [IN_KYIV, IN_KYIV]) for form, call in CALL_FORMS.items()},
    "text before and after": (f"A `x` <b>\n<tool_call>{KYIV}</tool_call>\nB", "A `x` <b>\n\nB", [IN_KYIV]),
    "no closing tag at the end": (f"<tool_call>{KYIV}", "", [IN_KYIV]),
    "no closing tag but a blank": (f"<tool_call>\n{KYIV}\n", "", [IN_KYIV]),
    "no closing tag between two": (f"<tool_call>{KYIV}<tool_call>{KYIV}</tool_call>", "", [IN_KYIV, IN_KYIV]),
    "several in one tag": (f"<tool_call>{KYIV}\n{LVIV}</tool_call>", "", [IN_KYIV, ("weather", {"city": "Lviv"})]),
    "several in one tag, by commas": (f"<tool_call>{KYIV}, {LVIV}</tool_call>", "", [IN_KYIV, ("weather", {"city": "Lviv"})]),
    "a broken one, closed, before another": (f"<tool_call>{{broken</tool_call><tool_call>{KYIV}</tool_call>", "<tool_call>{broken</tool_call>", [IN_KYIV]),
    "a list of several": (f"<tool_call>[{KYIV}, {LVIV}]</tool_call>", "", [IN_KYIV, ("weather", {"city": "Lviv"})]),
    "a long one": (f"A <tool_call>{LONG_CALL}</tool_call>\nB", "A \nB", [("write", LONG)]),
    "a long one after another in one tag": (f"<tool_call>{KYIV}\n{LONG_CALL}\n{LVIV}\n</tool_call>", "", [IN_KYIV, ("write", LONG), ("weather", {"city": "Lviv"})]),
    "a long one, arguments first": ('<tool_call>{"arguments": %s, "name": "write"}</tool_call>' % json.dumps(LONG), "", [("write", LONG)]),
    "a long one, arguments as a string": ("<tool_call>%s</tool_call>" % json.dumps({"name": "write", "arguments": json.dumps(LONG)}), "", [("write", LONG)]),
    "a long one in single quotes": ("<tool_call>%s</tool_call>" % {"name": "write", "arguments": LONG}, "", [("write", LONG)]),
    "a mark within a string": ('<tool_call>{"name": "write", "arguments": {"content": "</tool_call> <tool_call>"}}</tool_call>', "",
                               [("write", {"content": "</tool_call> <tool_call>"})]),
    "escapes": ('<tool_call>{"name": "write", "arguments": {"content": "\\"a\\\\\\n\\u00e9 {[ é"}}</tool_call>', "", [("write", {"content": '"a\\\n\xe9 {[ é'})]),
    "a raw line break in a string": ('<tool_call>{"name": "write", "arguments": {"content": "a\n\tb"}}</tool_call>', "", [("write", {"content": "a\n\tb"})]),
    "an apostrophe in single quotes": ("<tool_call>{'name': 'write', 'arguments': {'content': 'it\\'s \"x\"', 'path': None}}</tool_call>", "",
                                       [("write", {"content": 'it\'s "x"', "path": None})]),
    "no arguments": ("<tool_call>now</tool_call>", "", [("now", {})]),
    "an empty string as arguments": ('<tool_call>{"name": "now", "arguments": ""}</tool_call>', "", [("now", {})]),
    "null as arguments": ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    "no field arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "typed parameters": ("<function=weather>\n<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>\n</function>", "",
                         [("weather", {"city": "7", "days": 7})]),
    "parameters in Python's words": ("<function=write>\n<parameter=append>\nTrue\n</parameter>\n<parameter=mode>\nTrue\n</parameter>\n</function>", "",
                                     [("write", {"append": True, "mode": "True"})]),
    "a parameter that may be a string or null": ("<function=write>\n<parameter=mode>\n7\n</parameter>\n<parameter=append>\nNone\n</parameter>\n</function>", "",
                                                 [("write", {"mode": "7", "append": None})]),
    "another form's mark in a parameter": ("<function=write>\n<parameter=content>\n</arg_value>\n</parameter>\n</function>", "", [("write", {"content": "</arg_value>"})]),
    "parameters without a closing tag": ("<function=write>\n<parameter=content>\na\n</parameter>\n<function=now>\n</function>", "", [("write", {"content": "a"}), ("now", {})]),
    "lines in a parameter": ("<function=write>\n<parameter=content>\n<a>\n\nb\n\n</parameter>\n</function>", "", [("write", {"content": "<a>\n\nb\n"})]),
    "a call in think tags": (f"<think>\n`<tool_call>{KYIV}</tool_call>\n</think>\n\nI look.\n<tool_call>{LVIV}</tool_call>", "I look.\n", [("weather", {"city": "Lviv"})]),
    "calls that end the answer in an open think tag": (f"<think>\nSo:\n<tool_call>{KYIV}</tool_call>\n<tool_call>{LONG_CALL}<tool_call>{LVIV}\n", "",
                                                       [IN_KYIV, ("write", LONG), ("weather", {"city": "Lviv"})]),
    "a call in an open think tag, and reasoning after it": (f"<think>\n<tool_call>{LONG_CALL}</tool_call>\nor not", "", []),
    **{f"an open {name} in think tags": (f"<think>\nI'd write {call}\n</think>\n\nA <b>\n<tool_call>{KYIV}</tool_call>", "A <b>\n", [IN_KYIV])
       for name, call in {"string": '<tool_call>{"name": "now', "quote": "<tool_call>{name: ...} or it's", "object": "<tool_call>{", "argument": "<function=write>\n<parameter=path>"}.items()},
    "think tags after a call": (f"A\n<tool_call>{KYIV}</tool_call>\n<think>b</think>", "A\n\n<think>b</think>", [IN_KYIV]),
    "a think tag in an argument": ('A\n<tool_call>{"name": "write", "arguments": {"content": "(</think>)"}}</tool_call>', "A\n", [("write", {"content": "(</think>)"})]),
    "a think tag in a parameter": ("<function=write>\n<parameter=content>\n\n</think>\n\n</parameter>\n</function>", "", [("write", {"content": "\n</think>\n"})]),
    "a fence in the text before": (f"```\nx\n```\n<tool_call>{KYIV}</tool_call>", "```\nx\n```\n", [IN_KYIV]),
}
NO_CALLS = [
    "I would write <tool_call> now.", "The tag is <tool_call>, closed by </tool_call>.", "<tool_call>", "<tool_call></tool_call>", "<tool_cal", "a <", "[TOOL_",
    f"`<tool_call>{KYIV}</tool_call>`", f"``<tool_call>{KYIV}</tool_call>``", f"```\n<tool_call>{KYIV}</tool_call>\n```\n", f"```xml\n{CALL_FORMS['Hermes']}\n```",
    f"~~~\n{CALL_FORMS['Hermes']}\n~~~\nend", f"Example:\n\n- ```json\n{CALL_FORMS['Hermes']}\n```", f'It answers "<tool_call>{KYIV}</tool_call>".',
    '<tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>', '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>', '<tool_call>{"name": "weather", "arguments": {"city": "Kyiv"}</tool_call>',
    f"<tool_call>{KYIV}}}</tool_call>", f"<tool_call>{KYIV} is how it looks.", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": "Kyiv"}</tool_call>', '<function=weather>Kyiv</function>', "<function=rm>{}</function>", "<function=", KYIV,
    f"```json\n{KYIV}\n```", f"So: ```json\n{CALL_FORMS['Hermes']}\n```", "<|python_tag|>weather.call(city='Kyiv')", "<tool_call>rm\n<arg_key>a</arg_key>\n<arg_value>b</arg_value>\n</tool_call>",
    '<tool_call>{"name": "weather", "city": "Kyiv"}</tool_call>', '<tool_call>{"name": "weather", "input": {"city": "Kyiv"}}</tool_call>',
    f"<tool_call>[{KYIV}, {{}}]</tool_call>", "if (a[0] < b) { return '<tool>' }", '<tool_call>{"name": "weather", "arguments": {"city": "Ky',
    "a <function=now", "<tool_call>now\n", "<tool_call>[]</tool_call>", f"<tool_call>not {KYIV}</tool_call>", f"<tool_call>{KYIV}\n{{broken</tool_call>",
]
TOOL_ANSWERS.update({f"text: {text}": (text, text, []) for text in NO_CALLS})


def prompted(stream=True, **fields):
    call = Call({"model": "m", "messages": [user("x")], "tools": FUNCTIONS, **fields}, stream=stream)
    return akashproxy.PromptedTools(call, "m", akashproxy.TOOLS_PROMPT, "fake")


def tool_answer(pieces, stream=True):
    step = akashproxy.ToolCallFilter(prompted(stream))
    answer = fold(filtered(step, pieces) + step.close())
    assert answer.finish == Finish("tool_calls" if answer.tools else "stop")
    assert all(call.id for call in answer.tools) and [call.index for call in answer.tools] == list(range(len(answer.tools)))
    return answer.text, [(call.name, json.loads(call.arguments)) for call in answer.tools]


@table(TOOL_ANSWERS)
def test_calls_in_text_are_found_however_they_are_cut(answer, text, calls):
    places = range(1, len(answer), 1 + len(answer) // 12)    # character by character, it is cut everywhere
    cuts = [[answer], list(answer), *([answer[:at], answer[at:]] for at in places)]
    assert {str(tool_answer(pieces)) for pieces in cuts} == {str(tool_answer([answer], stream=False))} == {str((text, calls))}


def test_long_arguments_are_sent_as_they_arrive():
    content = "line\n" * 400
    for head in ('<tool_call>{"name": "write", "arguments": ', "<function=write>"):
        step = akashproxy.ToolCallFilter(prompted())
        arguments, tail = json.dumps({"content": content}), "}</tool_call>" if head[1] == "t" else "</function>"
        events = [step.feed([Text(piece)]) for piece in re.findall("(?s).{1,9}", head + arguments + tail)]
        calls = [event for batch in events for event in batch]
        assert len(calls) > 100 and all(isinstance(event, ToolCall) for event in calls)
        assert next(at for at, batch in enumerate(events) if batch) < 60 and step.feed([Finish("stop")]) == [Finish("tool_calls")]
        assert [json.loads(call.arguments) for call in fold(calls).tools] == [{"content": content}]


def test_a_long_call_that_proves_invalid_ends_a_stream_with_an_error_and_is_text_otherwise():
    answer = '<tool_call>{"name": "write", "arguments": {"content": "%s" oops}}</tool_call>' % ("x" * 999)
    for stream in (True, False):
        step = akashproxy.ToolCallFilter(prompted(stream))
        read = lambda: fold([event for piece in [*map(Text, answer), Finish("stop")] for event in step.feed([piece])])
        if stream:
            with pytest.raises(APIError, match="invalid tool call") as caught:
                read()
            assert caught.value.code == "invalid_tool_call"
        else:
            assert read().text == answer


def test_a_long_call_that_is_cut_by_the_limit_leaves_no_text():
    step = akashproxy.ToolCallFilter(prompted())
    head = '<tool_call>{"name": "write", "arguments": {"content": "%s"}' % ("x" * 999)
    answer = fold(step.feed([Text(head)]) + step.feed([Text(" ")]) + step.feed([Finish("length")]) + step.close())
    assert (answer.text, answer.finish) == ("", Finish("length")) and answer.tools[0].arguments == '{"content": "%s"}' % ("x" * 999)


def test_a_call_counts_for_the_token_limit():
    call = ToolCall(0, '{"a": "%s"}' % ("x" * 99), "c1", "f")
    assert StopFilter(["x"], 99).feed([call, Finish("stop")]) == [call, Finish("stop")]
    step = StopFilter([], 9)
    assert step.feed([Text("a"), ToolCall(0, "", "c1", "f"), call]) == [Text("a"), ToolCall(0, "", "c1", "f"), Finish("length")] and step.stopped


def test_only_what_may_begin_a_call_is_held_back():
    step = akashproxy.ToolCallFilter(prompted())
    assert fold(step.feed([Text("a <b> [c] <tool")])).text == "a <b> [c] " and fold(step.feed([Text("s>")])).text == "<tools>"


def test_without_parallel_calls_the_first_one_ends_the_answer():
    for call in (KYIV, LONG_CALL):    # one that is sent at once, and one in parts
        answer = f"A <tool_call>{call}\n{KYIV}</tool_call>\n<tool_call>{KYIV}</tool_call>\nB"
        for parts in ([answer], re.findall("(?s).{1,9}", answer)):
            step = akashproxy.ToolCallFilter(prompted(parallel_tool_calls=False))
            events = filtered(step, parts) + step.close()
            got = fold(events)
            assert step.stopped and [type(event) for event in events].count(Finish) == 1 and type(events[-1]) is Finish
            assert (got.text, [json.loads(each.arguments) for each in got.tools], got.finish) == ("A ", [json.loads(call)["arguments"]], Finish("tool_calls"))
    assert fold(filtered(akashproxy.ToolCallFilter(prompted(parallel_tool_calls=False)), [f"<tool_call>{KYIV}"])).finish == Finish("tool_calls")


@pytest.mark.parametrize("call", ["<tool_call>now", "<function=write>\n<parameter=path>\na\n</parameter>\n", f"<tool_call>{KYIV}", f"<tool_call>{KYIV}\n{{"])
def test_a_call_that_may_be_cut_by_the_limit_is_text(call):
    step = akashproxy.ToolCallFilter(prompted())
    answer = fold(step.feed([Text(call)]) + step.feed([Finish("length")]) + step.close())
    assert answer.text == call and not answer.tools and answer.finish == Finish("length")


TOOL_MODELS = {"x": "<tool_call>\n{", "Qwen/Qwen3-235B-A22B": "<tool_call>\n{", "Meta-Llama-3-3-70B-Instruct": "<function=", "zai-org/GLM-4.5-Air": "<tool_call>FUNCTION\n<arg_key>",
               "Qwen3-Coder-480B": "<tool_call>\n<function=", "DeepSeek-V3-1": "<｜tool▁calls▁begin｜>", "moonshotai/Kimi-K2-Instruct": "<|tool_calls_section_begin|>"}


@pytest.mark.parametrize("model", TOOL_MODELS)
def test_tools_and_history_become_text_in_the_models_own_form(model):
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
               {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Kyiv"}'}}] * 2},
               returned("c1", "sun"), {"role": "tool", "tool_call_id": "c2", "content": [text_part("rain")]}]
    call = Call({"model": model, "messages": history, "tools": FUNCTIONS, "tool_choice": "required"})
    tools = akashproxy.PromptedTools(call, model, akashproxy.TOOLS_PROMPT, "fake")
    system, user, assistant, results = akashproxy.join_user_messages(tools.body()["messages"])
    assert set(tools.body()) == {"model", "messages"} and user == history[1] and [m["role"] for m in (assistant, results)] == ["assistant", "user"]
    assert TOOL_MODELS[model] in system["content"] and system["content"].endswith(akashproxy.MUST_CALL) and json.dumps(FUNCTIONS[2], separators=(",", ":")) in system["content"]
    assert results["content"].index("sun") < results["content"].index("rain")
    step = akashproxy.ToolCallFilter(tools)
    assert fold(step.feed([Text(assistant["content"]), Finish("stop")])).text == "I look.\n\n" and step.count == 2, "it reads what it writes"


@pytest.mark.parametrize("model", TOOL_MODELS)
def test_half_a_character_and_an_object_in_past_calls_are_accepted(model):
    calls = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}} for arguments in ('{"city": "Ky\ud83d"}', {"city": "x'y"})]
    call = Call({"model": model, "messages": [{"role": "assistant", "content": None, "tool_calls": calls}], "tools": FUNCTIONS})
    tools = akashproxy.PromptedTools(call, model, akashproxy.TOOLS_PROMPT, "fake")
    step = akashproxy.ToolCallFilter(tools)
    answer = tools.body()["messages"][-1]["content"].encode("utf-8", "replace").decode()
    first, second = fold(step.feed([Text(answer), Finish("stop")])).tools
    assert "Ky" in json.loads(first.arguments)["city"] and json.loads(second.arguments) == {"city": "x'y"}


def test_images_of_a_result_are_kept():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    call = Call({"model": "m", "messages": [user("x"), returned("c1", [text_part("100%s"), image])], "tools": FUNCTIONS})
    result = akashproxy.PromptedTools(call, "m", akashproxy.TOOLS_PROMPT, "fake").body()["messages"][-1]
    assert result == user([text_part("<tool_response>\n100%s\n</tool_response>"), image])


def akash_text(text):
    return STEP + b"".join(b"0:" + json.dumps(piece).encode() + b"\n" for piece in re.findall("(?s).{1,5}", text)) + STOP


def prompting(url, **more):
    return dict(controllers=(akashproxy.ControllerSettings(type="akash", base_url=url, tools="prompt"),), **more)


CALLING = {**user(None), "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@table({    # (path, fields of a request, status)
    "another role": ("messages", {"messages": [{"role": "tool", "content": "hi"}]}, 400),
    "no items": ("responses", {"input": 1.5}, 400), "several prompts": ("completions", {"prompt": ["a", "b"]}, 400),
    "no content": ("chat/completions", {"messages": [CALLING, {"role": "user"}, user("hi")]}, 200),
    "no content beside parts": ("chat/completions", {"messages": [CALLING, user(None), user([text_part("hi")])]}, 200),
    "a number": ("chat/completions", {"messages": [CALLING, user(5)]}, 400),
})
def test_odd_requests_do_no_harm_where_tools_are_text(path, fields, status, akash, serve):
    server = serve(**prompting(akash.url))
    got = ask(server, "POST", f"/v1/{path}", {"model": "Qwen/Qwen3", "max_tokens": 9, **fields})
    assert got.status == status and ask(server, path="/status").json["controllers"][0]["failed"] == 0, got.body


@pytest.mark.parametrize("mode", ["first", "user"])
def test_a_system_message_without_content_does_no_harm(mode, fake, pool):
    server = pool((fake, {"paths": ("/none",), "system_messages": mode}))
    messages = [system("a"), {"role": "system"}, user("hi"), {"role": "system"}, {"role": "system", "content": None}]
    assert chat(server, {**BOTH, "messages": messages}).status == 200


TOOL_REQUESTS = {
    "/v1/chat/completions": {"messages": [user("hi")], "tools": FUNCTIONS},
    "/v1/messages": {"max_tokens": 99, "messages": [user("hi")], "tools": [{"name": "weather", "input_schema": {"type": "object"}}]},
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}]},
}


@pytest.mark.parametrize("path", TOOL_REQUESTS)
def test_akash_calls_tools_in_every_dialect(path, streamed, akash, serve):
    akash.chat = akash_text(f"I look.\n<tool_call>\n{KYIV}\n</tool_call>")
    server = serve(**prompting(akash.url))
    got = ask(server, "POST", path, {"model": "Qwen/Qwen3", "stream": streamed, **TOOL_REQUESTS[path]})
    assert got.status == 200 and b"weather" in got.body and b"Kyiv" in got.body and b"tool_call>" not in got.body
    assert (got.headers.get("x-akashproxy-ignored") == "strict") == (path == "/v1/responses")
    [sent] = [body for body in akash.bodies() if "messages" in body]
    assert '"name":"weather"' in sent["system"] and "tools" not in sent
    assert {model["tools"] for model in ask(server, path="/v1/models").json["data"]} == {"prompt"}


def test_a_required_call_is_asked_for_once_more(streamed, akash, serve):
    server = serve(**prompting(akash.url))
    body = {"model": "Qwen/Qwen3", "stream": streamed, "tool_choice": "required", **TOOL_REQUESTS["/v1/chat/completions"]}
    akash.chat = akash_text('<tool_call>{"name": "rm", "arguments": {}}</tool_call>')
    got, sent = ask(server, "POST", "/v1/chat/completions", body), [body for body in akash.bodies() if "messages" in body]
    assert got.status == 200 and b"rm" in got.body and b'"tool_calls":[' not in got.body and len(sent) == 2
    assert "'rm' is not a function" in sent[1]["messages"][-1]["content"] and "is not a function" not in sent[0]["messages"][-1]["content"]


@pytest.mark.parametrize("kind, mode, status", [("akash", "", 400), ("akash", "refuse", 400), ("akash", "prompt", 200),
                                                ("openai", "", 200), ("openai", "native", 200), ("openai", "refuse", 400)])
def test_a_controller_takes_or_refuses_tools(kind, mode, status, akash, fake, pool):
    server = pool((akash if kind == "akash" else fake, {"tools": mode}))
    body = {"model": "gpt-x", "messages": [user("hi")], "tools": FUNCTIONS}
    assert chat(server, body).status == status
    assert fake.bodies() == [body] * (kind == "openai" and status == 200)
    assert chat(server, body, tools=[]).status == 200


# == the matrix: every controller, every dialect ==============================================


def read_chat(told):
    """The events of a chat's body, or of its chunks; what is no event is the words of an error."""
    for event in told if isinstance(told, list) else [told]:
        if "error" in event:
            yield event["error"]["message"]
        for choice in event.get("choices", []):
            message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            yield from [R(message["reasoning_content"])] if message.get("reasoning_content") else []
            yield from [T(message["content"])] if message.get("content") else []
            for at, call in enumerate(message.get("tool_calls", [])):
                yield ToolCall(call.get("index", at), call["function"]["arguments"], call.get("id"), call["function"].get("name"))
            yield from [Finish(choice["finish_reason"])] if choice["finish_reason"] else []


def read_messages(told):
    blocks, stops = [], {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
    for event in told if isinstance(told, list) else []:
        if event["type"] == "error":
            yield event["error"]["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            name, piece = list(event["delta"].items())[1]
            blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + piece
        elif event["type"] == "message_delta":
            told = {**event["delta"], "content": blocks}
    for at, block in enumerate(blocks if isinstance(told, list) else told["content"]):
        if block["type"] == "tool_use":
            yield ToolCall(at, block.get("partial_json") or json.dumps(block["input"], separators=(",", ":")), block["id"], block["name"])
        else:
            yield T(block["text"]) if block["type"] == "text" else R(block["thinking"])
    yield from [] if isinstance(told, list) else [Finish(stops[told["stop_reason"]])]


def read_responses(told):
    items = [event["item"] for event in told if event["type"] == "response.output_item.done"] if isinstance(told, list) else told["output"]
    for at, item in enumerate(items):
        if item["type"] == "function_call":
            yield ToolCall(at, item["arguments"], item["call_id"], item["name"])
        else:
            yield T(item["content"][0]["text"]) if item["type"] == "message" else R(item["summary"][0]["text"])
    if isinstance(told, list) and told[-1]["type"] == "response.failed":
        yield from (T(event["delta"]) for event in told if event["type"] == "response.output_text.delta")
        yield told[-1]["response"]["error"]["message"]
    else:
        response = told[-1]["response"] if isinstance(told, list) else told
        assert response["output"] == items
        reason = (response["incomplete_details"] or {"reason": "tool_calls" if items[-1]["type"] == "function_call" else "stop"})["reason"]
        yield Finish(reason.replace("max_output_tokens", "length"))


DIALECTS = {
    # name: (path, body, its reader, how a stream is taken apart, what it has no place for)
    "chat": ("/v1/chat/completions", {"messages": [user("hi")]}, read_chat, sse, ()),
    "completions": ("/v1/completions", {"prompt": "hi"}, read_chat, sse, (Reasoning, ToolCall)),
    "messages": ("/v1/messages", {**ASKED, "thinking": {"type": "adaptive"}}, read_messages, named_events, ()),
    "responses": ("/v1/responses", {"input": "hi"}, read_responses, named_events, ()),
}
ONE = FakeOpenAI.event({"content": "one "})
BREAKS = "one\u2028data: [DONE]\u2028\u2028two\u2029three\x85\u4e2d four\x0b."
RAW_BREAKS = json.dumps(BREAKS, ensure_ascii=False).encode()
MATRIX = {
    # name: (what Akash does, what an OpenAI does, the events, words of the error)
    "text": (lambda fake: fake.cut(HELLO, True), lambda fake: answered({"content": "Hello"}, {"content": " from the mock."}),
             [T("Hello from the mock."), Finish("stop")], None),
    "reasoning": (lambda fake: fake.cut(b'g:"h"\ng:"m"\n0:"42"\n' + STOP, True), lambda fake: answered({"reasoning_content": "hm"}, {"content": "42"}),
                  [R("hm"), T("42"), Finish("stop")], None),
    "a thought in tags": (lambda fake: fake.cut(b'0:"<think>\\nhm\\n</think>\\n\\n"\n0:"42"\n' + STOP, True), None, [R("hm"), T("42"), Finish("stop")], None),
    "calls of tools": (lambda fake: fake.cut(b'9:{"toolCallId":"call_1","toolName":"f","args":{"a":1}}\n9:{"toolCallId":"c2","toolName":"g","args":{}}\n'
                                             + END.replace(b"%b", b"tool-calls"), True),
                       lambda fake: answered(calls((0, "call_1", "f", "")), calls((0, None, None, '{"a":1')), calls((1, "c2", "g", "{}")),
                                             calls((0, None, None, "}")), finish="tool_calls"),
                       [ToolCall(0, '{"a":1}', "call_1", "f"), ToolCall(1, "{}", "c2", "g"), Finish("tool_calls")], None),
    "a picture": (lambda fake: fake.cut(PICTURE_LINE, True), None, [T("![A red fox in the snow](SITE/images/job_51083a4c_00001_.png)"), Finish("stop")], None),
    "length": (lambda fake: fake.cut(b'0:"one "\n' + END.replace(b"%b", b"length"), True), lambda fake: answered({"content": "one "}, finish="length"),
               [T("one "), Finish("length")], None),
    "an error before": (lambda fake: fake.raw(reply(500), True), lambda fake: fake.status(500), [], "without giving a reason|told"),
    "an error within": (lambda fake: fake.cut(b'0:"one "\n3:"boom"\n', True), lambda fake: fake.raw(fake.head() + chunk(ONE) + chunk(ERROR_EVENT)),
                        [T("one ")], "boom"),
    "cut": (lambda fake: fake.cut(b'0:"one "\n'), lambda fake: fake.raw(fake.head() + chunk(ONE)), [T("one ")], "broke off"),
    "cut when a filter holds something back": (lambda fake: fake.cut(b'0:"one </thin"\n'), None, [T("one </thin")], "broke off"),
    "a message that just ends": (lambda fake: fake.cut(b'0:"one "\n', True), lambda fake: fake.raw(fake.head() + chunks(ONE)),
                                 [T("one ")], EARLY),
    "no reason to end": (lambda fake: fake.cut(b'0:"one "\n' + END.replace(b"%b", b"unknown"), True), None, [T("one ")], NO_REASON),
    "a limit within": (lambda fake: fake.cut(b'0:"one "\n3:"Rate limit exceeded"\n', True), None, [T("one ")], "Rate limit"),
    "in single bytes": (lambda fake: fake.steps(*re.findall(b"(?s).", STREAM_HEAD + chunks(*HELLO.splitlines(True)))),
                        lambda fake: fake.steps(*re.findall(b"(?s).", fake.head() + chunks(*fake.words("Hello from the mock.")))),
                        [T("Hello from the mock."), Finish("stop")], None),
    "to the end of the connection": (lambda fake: fake.raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + HELLO),
                                     lambda fake: fake.raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
                                                           + b"".join(fake.words("Hello from the mock."))),
                                     [T("Hello from the mock."), Finish("stop")], None),
    "an answer at once": (None, lambda fake: fake.raw(reply(body=fake.completion()), True), [T("Hi there."), Finish("stop")], None),
    "line breaks of Unicode": (lambda fake: fake.cut(b"g:" + RAW_BREAKS + b"\n0:" + RAW_BREAKS + b"\n" + STOP, True),
                               lambda fake: fake.raw(fake.head() + chunks(b'data: {"choices":[{"delta":{"content":%b,' % RAW_BREAKS,
                                                                          b'"reasoning_content":%b}}]}\n\n' % RAW_BREAKS, fake.event({}, "stop")), True),
                               [R(BREAKS), T(BREAKS), Finish("stop")], None),
    "echoed": (None, None, [T("hi"), Finish("stop")], None),
}


class Paced:
    """A fake's socket that sends one chunk after the other, each when the server has read the last one."""

    def __init__(self, sock, server):
        self.sock, self.server = sock, server

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def sendall(self, data):
        while data:
            line, _, rest = data.partition(b"\r\n")
            size = int(line, 16) + len(line) + 4 if re.fullmatch(b"[0-9a-f]+", line) else data.find(b"\r\n\r\n") + 4
            self.sock.sendall(data[:max(size, 1)])
            data = data[max(size, 1):]
            for _ in range(2):      # once it may have been asking already what there is to read
                done = threading.Event()
                self.server.loop.call_soon_threadsafe(done.set)
                done.wait(10)


@pytest.mark.parametrize("streamed", [0, 1, 2], ids=["whole", "streamed", "token by token"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind, name", [(kind, name) for name, entry in MATRIX.items() for kind, has in zip(("akash", "openai", "echo"), (*entry[:2], name == "echoed")) if has])
def test_the_matrix(kind, name, dialect, streamed, pool):
    path, body, reader, taken_apart, missing = DIALECTS[dialect]
    *faults, events, words = MATRIX[name]
    fake = FakeAkash() if kind == "akash" else FakeOpenAI()
    server = pool((fake, {"akash": {}, "openai": {"paths": ["/none"]}, "echo": {"type": "echo", "speed": 0.0}}[kind]), image_poll=0.01)
    if kind != "echo":
        does = faults[kind == "openai"](fake)
        fake.faults.append(does if streamed < 2 else lambda sock, request: does(Paced(sock, server), request))
    got = ask(server, "POST", path, {**body, "model": "AkashGen" if name == "a picture" else "both", "stream": bool(streamed)})
    if words and (not streamed or not events):
        assert got.status == (429 if words == "Rate limit" else 502) and re.search(words, got.json["error"]["message"])
        return
    assert got.status == 200, got.body
    assert not streamed or got.body.decode().splitlines() == got.body.decode().split("\n")[:-1], "a client may take other characters for line breaks"
    result = list(reader(taken_apart(got.body) if streamed else got.json))
    error = next((event for event in result if isinstance(event, str)), None)
    assert error is None if words is None else re.search(words, error)
    expected = [T(event.text.replace("SITE", server.url)) if isinstance(event, Text) else event for event in events if not isinstance(event, missing)]
    answer, wanted = fold(result), fold(expected)
    for side in (answer, wanted):   # they may be counted otherwise, but not stand in another order
        side.tools = [dataclasses.replace(call, index=at) for at, call in enumerate(side.tools)]
    assert answer == wanted


def test_many_akash_controllers_hold_a_large_request_once():
    controllers = tuple(akashproxy.ControllerSettings(type="akash", name=f"login{number}") for number in range(10))
    pool, call = akashproxy.Pool(Settings(controllers=controllers)), Call({"model": "m", "messages": [user("word " * 200_000)]})
    tracemalloc.start()
    try:
        assert [pool.support_error(upstream, call) for upstream in pool.upstreams] == [None] * 10
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@table({
    # name: (a controller's options, fields of a chat, names and values that are sent, what is ignored)
    "a fixed value": ({"set": {"temperature": 0.2}}, {"temperature": 1}, {"temperature": 0.2}, None),
    "a new name": ({"rename": {"creativity": "top_p"}}, {"creativity": 0.4}, {"topP": 0.4}, None),
    "a field of messages": ({"drop": ["tool_calls"]}, {"messages": [user("hi"), {**C1, "content": "x"}, user("go")]},
                            {"messages": [user("hi"), assistant("x"), user("go")]}, "tool_calls"),
    "in turn": ({"drop": ["top_p"], "rename": {"temperature": "top_p"}, "set": {"temperature": 0.3, "seed": 1}}, {"top_p": 0.1, "temperature": 0.2},
                {"topP": 0.2, "temperature": 0.3}, "top_p, seed"),
    "a parameter that is implemented here": ({"set": {"stop": ["from"]}}, {}, {}, None),
})
def test_an_akash_controller_adapts_requests(options, fields, sent, ignored, akash, pool):
    got = chat(pool((akash, options)), {**CHAT, **fields})
    assert got.status == 200 and got.headers.get("x-akashproxy-ignored") == ignored
    assert text_of(got) == ("Hello " if "stop" in options.get("set", {}) else "Hello from the mock.")
    assert {name: akash.bodies()[0][name] for name in sent} == sent


def test_any_upstream_can_get_tools_as_text(streamed, serve):
    fake = FakeOpenAI(text=f"<think>\nhm\n</think>I look. <tool_call>\n{KYIV}\n</tool_call>")
    history = [user("hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
               returned("c", "noon"), user("So?")]
    server = serve(controllers=(akashproxy.ControllerSettings(base_url=fake.url, tools="prompt", paths=("*",)),))
    got = ask(server, "POST", "/v1/chat/completions", {"model": "gpt-x", "stream": streamed, "messages": history, "tools": [{"type": "retrieval"}, *FUNCTIONS]})
    answer, sent = fold(read_chat(sse(got.body) if streamed else got.json)), json.loads(fake.requests[-1].body)
    assert (answer.text, answer.reasoning, answer.finish) == ("I look. ", "hm", Finish("tool_calls"))
    assert [(call.name, json.loads(call.arguments)) for call in answer.tools] == [IN_KYIV] and got.headers["x-akashproxy-ignored"] == "retrieval"
    assert "tools" not in sent and [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][2]["content"] == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert sent["messages"][3]["content"] == "<tool_response>\nnoon\n</tool_response>\n\nSo?"
    plain = {"model": "gpt-x", "stream": streamed, "messages": [user("hi")]}
    ask(server, "POST", "/v1/chat/completions", plain)
    assert json.loads(fake.requests[-1].body) == plain, "a chat without tools is relayed unchanged"


def test_tools_as_text_work_for_a_controller_of_ones_own(serve):
    server = serve(controllers=(akashproxy.ControllerSettings(type="echo", tools="prompt", speed=0),))
    body = {"model": "echo", "messages": [user(f"I look. <tool_call>{KYIV}</tool_call>")], "tools": FUNCTIONS}
    [call] = fold(read_chat(ask(server, "POST", "/v1/chat/completions", body).json)).tools
    assert (call.name, json.loads(call.arguments)) == IN_KYIV


def named(*names):
    return [{"type": "function", "function": {"name": name}} for name in names]


@pytest.mark.parametrize("choice, expected", {     # a tool_choice: the functions in the prompt, whether one must be called
    "none": ([], False), "auto": (["weather", "write", "now"], False), "required": (["weather", "write", "now"], True),
    json.dumps(named("now")[0]): (["now"], True),
    json.dumps({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named("now", "write")}}): (["write", "now"], False),
    json.dumps({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named("write")}}): (["write"], True),
    json.dumps(named("rm")[0]): None, "sometimes": None, "7": None, '{"type": "custom"}': None,
}.items())
def test_a_choice_of_tools_is_put_into_the_prompt(choice, expected):
    value = json.loads(choice) if choice[0] in "{7" else choice
    if expected is None:
        with pytest.raises(APIError, match="'tool_choice' must be"):
            prompted(tool_choice=value)
        return
    tools = prompted(tool_choice=value)
    *system, message = tools.body()["messages"]
    assert message == user("x") and (list(tools.functions), tools.required) == expected and bool(system) == bool(tools.functions)
    system = "".join(message["content"] for message in system)
    assert (re.findall(r'"function":{"name":"(\w+)"', system), akashproxy.MUST_CALL in system) == expected


def test_a_required_call_is_asked_for_once_and_only_before_a_part_was_sent():
    tools = prompted(tool_choice="required")
    with pytest.raises(APIError, match="has no tool call") as caught:
        akashproxy.ToolCallFilter(tools).feed([Text("I look."), Finish("stop")])
    assert caught.value.category is Category.RETRY and tools.complaint
    assert akashproxy.ToolCallFilter(tools).feed([Text("I look."), Finish("stop")]) == [Text("I look."), Finish("stop")]
    step = akashproxy.ToolCallFilter(prompted(tool_choice="required"))
    assert step.feed([Text("I look.")]) + step.feed([Finish("stop")]) == [Text("I look."), Finish("stop")]
    step = akashproxy.ToolCallFilter(prompted(tool_choice="required"))
    assert len(fold(step.feed([Text(f"<think><tool_call>{{oops</tool_call></think><tool_call>{KYIV}"), Finish("stop")])).tools) == 1


def test_an_instruction_of_ones_own_replaces_the_built_in_one(akash, serve):
    server = serve(tools_prompt="Tools: {tools} Form: {call}", **prompting(akash.url))
    ask(server, "POST", "/v1/chat/completions", {"model": "Qwen/Qwen3", **TOOL_REQUESTS["/v1/chat/completions"]})
    [sent] = [body for body in akash.bodies() if "messages" in body]
    assert sent["system"].startswith('Tools: {"type":"function"') and "You can call" not in sent["system"]


STRING = {"type": "string"}
# What coding agents send: the path, one request with its functions, and what they call their shell.
AGENTS = {
    "opencode": ("/v1/chat/completions", "bash", {"command": STRING, "timeout": {"type": "number"}, "description": STRING}, ["command", "description"]),
    "qwen-code": ("/v1/chat/completions", "run_shell_command", {"command": STRING, "is_background": {"type": "boolean"}}, ["command", "is_background"]),
    "cline": ("/v1/chat/completions", "run_commands", {"commands": {"type": "array", "items": STRING}}, ["commands"]),
    "Codex": ("/v1/responses", "exec_command", {"cmd": STRING, "workdir": STRING, "yield_time_ms": {"type": "number"}}, ["cmd"]),
    "Codex, older": ("/v1/responses", "shell", {"command": {"type": "array", "items": STRING}}, ["command"]),
    "Claude Code": ("/v1/messages", "Bash", {"command": STRING, "description": STRING, "run_in_background": {"type": "boolean"}}, ["command"]),
}
OTHERS = {"Read": {"file_path": STRING}, "todo": {"items": {"type": "array"}}, "submit_and_exit": {"summary": {**STRING, "minLength": 10}}}


def agent_request(path, tools, turns):
    """A streamed request of a dialect; turns are (id, name, arguments, result)."""
    if path == "/v1/chat/completions":
        calls = [[{"role": "assistant", "content": "x", "tool_calls": [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}]},
                  returned(id, result)] for id, name, arguments, result in turns]
        functions = [{"type": "function", "function": {"name": name, "description": "d", "parameters": schema}} for name, schema in tools.items()]
        more = {"messages": [system("You are an agent."), user("Go."), *sum(calls, [])], "stream_options": {"include_usage": True}}
    elif path == "/v1/messages":
        calls = [[assistant([{"type": "tool_use", "id": id, "name": name, "input": json.loads(arguments)}]),
                  user([{"type": "tool_result", "tool_use_id": id, "content": [text_part(result)]}])]
                 for id, name, arguments, result in turns]
        functions = [{"name": name, "description": "d", "input_schema": schema} for name, schema in tools.items()]
        more = {"system": [text_part("You are an agent.")], "messages": [user("Go."), *sum(calls, [])], "max_tokens": 32000}
    else:
        calls = [[{"type": "function_call", "call_id": id, "name": name, "arguments": arguments}, {"type": "function_call_output", "call_id": id, "output": result}]
                 for id, name, arguments, result in turns]
        functions = [{"type": "function", "name": name, "strict": False, "parameters": schema} for name, schema in tools.items()] + [{"type": "web_search"}]
        more = {"instructions": "You are an agent.", "input": [{"type": "message", **user("Go.")}, *sum(calls, [])], "parallel_tool_calls": False, "store": False}
    return {"model": "demo", "stream": True, "tools": functions, "tool_choice": {"type": "auto"} if path == "/v1/messages" else "auto", **more}


@table(AGENTS)
def test_an_agent_finishes_the_demos_task(path, shell, fields, required, demo, tmp_path):
    tools = {name: {"type": "object", "properties": properties, "required": list(properties)} for name, properties in {**OTHERS, shell: fields}.items()}
    tools[shell]["required"], turns, server = required, [], demo
    for step in range(5):
        got = ask(server, "POST", path, agent_request(path, tools, turns))
        assert got.status == 200
        answer = fold(next(reader(taken_apart(got.body)) for at, _, reader, taken_apart, _ in DIALECTS.values() if at == path))
        if not answer.tools:
            break
        [call] = answer.tools
        command = next(value for key, value in [*json.loads(call.arguments).items(), ("", "")] if key in ("command", "cmd", "commands", ""))
        command = command if isinstance(command, str) else command[-1]
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        turns.append((call.id, call.name, call.arguments, done.stdout))
        assert call.name == (shell if step < 3 else "submit_and_exit")
    assert (tmp_path / "akashproxy-demo.txt").read_text() == "Hello from the demo.\n" == turns[1][3] and "21" in turns[2][3]
    assert len(turns) == 4 and "demo is done" in answer.text


# == proxies and TLS ==========================================================================


class ForwardProxy(Fake):
    def serve(self, sock):
        with contextlib.suppress(OSError), sock:
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(65536)
            line, _, rest = head.partition(b"\r\n")
            method, target, _ = line.decode().split(" ")
            self.requests.append(Asked(method, target, dict(
                (name.lower(), value.strip()) for name, _, value in (field.partition(":") for field in rest.decode("latin-1").split("\r\n"))), b""))
            host = target if method == "CONNECT" else target.split("/")[2]
            with socket.create_connection(host.rsplit(":", 1)) as upstream:
                if method == "CONNECT":
                    sock.sendall(b"HTTP/1.1 200 OK\r\nVia: 1.1 x\r\n\r\n")
                else:
                    path = "/" + target.split("/", 3)[3]
                    upstream.sendall(f"{method} {path} HTTP/1.1\r\n".encode() + rest)
                back = threading.Thread(target=self.pump, args=(upstream, sock), daemon=True)
                back.start()
                self.pump(sock, upstream)
                back.join(10)

    @staticmethod
    def pump(source, target):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


class SocksServer(ForwardProxy):
    """A SOCKS 5 proxy, with a user and a password if wanted; .requests are (kind of address, host, port, login)."""

    def __init__(self, login=None, code=0):
        self.login, self.code = login, code
        super().__init__()

    def serve(self, sock):
        with contextlib.suppress(OSError, IndexError), sock:
            stream = sock.makefile("rb", buffering=0)
            methods = stream.read(stream.read(2)[1])
            method = 2 if self.login else 0
            sock.sendall(bytes([5, method if method in methods else 255]))
            login = [stream.read(stream.read(size)[-1]).decode() for size in (2, 1)] if method in methods and method else None
            if login:
                sock.sendall(bytes([1, login != self.login]))
            kind = stream.read(4)[3]
            raw = stream.read({1: 4, 4: 16}.get(kind) or stream.read(1)[0])
            host = raw.decode() if kind == 3 else str(akashproxy.ipaddress.ip_address(raw))
            port = int.from_bytes(stream.read(2), "big")
            self.requests.append((kind, host, port, login))
            sock.sendall(bytes([5, self.code, 0, 3, 4]) + b"host" + b"xx")
            if not self.code:
                with socket.create_connection((host, port)) as upstream:
                    threading.Thread(target=self.pump, args=(upstream, sock), daemon=True).start()
                    self.pump(sock, upstream)


@pytest.mark.parametrize("scheme, user, login, kind", [("socks5h", "", None, 3), ("socks5", "", None, 1),
                                                       ("socks5", "user:word@", None, 1), ("socks5h", "us%3Aer:p%40w@", ["us:er", "p@w"], 3)])
def test_a_socks_proxy_on_the_way(pool, tmp_path, scheme, user, login, kind):
    for fake, ca_file in ((FakeOpenAI(), ""), (TLSOpenAI(tmp_path), str(tmp_path / "ca.pem"))):
        proxy = SocksServer(login)
        name = fake.url.replace("127.0.0.1", "localhost") if not ca_file else fake.url
        server = pool((fake, {"base_url": name + "/v1"}), ca_file=ca_file, proxy=f"{scheme}://{user}127.0.0.1:{proxy.port}")
        assert chat(server, BOTH).status == chat(server, BOTH).status == 200
        host, kind = ("localhost", kind) if not ca_file else ("127.0.0.1", 1)
        assert proxy.requests == [(kind, "127.0.0.1" if kind == 1 else host, fake.port, proxy.login)]


@pytest.mark.parametrize("user, login, code, words", [
    ("", ["a", "b"], 0, "is not SOCKS 5 or refuses this login"), ("a:s3cret@", ["a", "b"], 0, "rejected the user or the password"),
    ("", None, 5, "SOCKS reply 5"), ("", None, 4, "SOCKS reply 4")])
def test_a_socks_proxy_that_refuses(fake, pool, user, login, code, words):
    proxy = SocksServer(login, code)
    got = chat(pool(fake, proxy=f"socks5h://{user}127.0.0.1:{proxy.port}"), BOTH)
    assert got.status == 502 and words in got.json["error"]["message"] and "the proxy 127.0.0.1 " in got.json["error"]["message"]
    assert b"s3cret" not in got.body and not fake.requests


@pytest.mark.parametrize("environ, url, proxy", [
    ({"HTTPS_PROXY": "http://p:1"}, "https://a.b/v1", "http://p:1"), ({"HTTPS_PROXY": "http://p:1"}, "http://a.b/v1", ""),
    ({"http_proxy": "p:1"}, "http://a.b/v1", "http://p:1"), ({"http_proxy": "http://low:1", "HTTP_PROXY": "http://up:1"}, "http://a.b", "http://low:1"),
    ({"ALL_PROXY": "socks5h://p"}, "https://a.b", "socks5h://p"), ({"HTTPS_PROXY": "http://p:1/", "ALL_PROXY": "socks://p:2/"}, "https://a.b", "http://p:1/"), ({"ALL_PROXY": "http://all:1", "HTTPS_PROXY": "http://p:1"}, "https://a.b", "http://p:1"),
    *(({"ALL_PROXY": "http://p:1", "NO_PROXY": no_proxy}, "https://api.b.example:8443/v1", "" if bypassed else "http://p:1") for no_proxy, bypassed in (
        ("*", True), ("b.example", True), (".b.example", True), ("*.b.example", True), ("x, B.Example", True), ("api.b.example:8443", True),
        ("api.b.example:443", False), ("api.b.example:²", False), ("i.b.example", False), ("example.com", False), (",", False), ("10.0.0.0/8", False), (".", False))),
    *(({"ALL_PROXY": "http://p:1", "NO_PROXY": no_proxy}, "http://10.1.2.3", "" if bypassed else "http://p:1") for no_proxy, bypassed in (
        ("10.0.0.0/8", True), ("10.1.2.3", True), ("10.1.2.3:80", True), ("10.1.2.3:81", False), ("11.0.0.0/8", False), ("1.2.3", False))),
    *(({"ALL_PROXY": "socks://p:1/", "NO_PROXY": no_proxy}, "http://gpu.node1:8080", "" if bypassed else "socks://p:1/") for no_proxy, bypassed in (
        ("gpu.node1", True), ("node1", True), ("node1:8080", True), ("1", False), ("ode1", False))),
    ({"ALL_PROXY": "http://p:1", "NO_PROXY": "::1"}, "http://[::1]:9", ""), ({"ALL_PROXY": "http://p:1", "NO_PROXY": "[::1]"}, "http://[::1]", ""),
    ({"PROXY": "none", "HTTPS_PROXY": "https://p:1"}, "https://a.b", ""), ({"PROXY": "http://q:2", "HTTPS_PROXY": "http://p:1"}, "https://a.b", "http://q:2"),
])
def test_the_environments_proxies_rule_as_with_curl(environ, url, proxy):
    options, = Settings.load({"AKASH_BASE_URL": url, **environ}).pool()
    assert options.proxy == proxy


def test_a_controllers_own_proxy_precedes_and_the_settings_say_which_rules(config):
    path = config({"controllers": [{"type": "akash", "proxy": "none"}, {"type": "akash", "proxy": "http://u@v:s3cret@a:1"}, {"type": "akash"}]})
    done = run("--config-file", path, "--proxy", "socks5://u:s3cret@b:2", "--check")
    assert [line for line in done.stdout.splitlines() if line.lower().startswith("proxy")] == [
        "PROXY=socks5://u:********@b:2", "proxy=http://u@v:********@a:1", "proxy=socks5://u:********@b:2 (PROXY)"] and "s3cret" not in done.stdout
    server = Server(dataclasses.replace(load(path), server_address="127.0.0.1:0"))
    assert str(server.pool).split(", akash")[1] == "-2 (https://chat.akash.network, proxy http://u@v:********@a:1)"
    server.stop(0)


LOOKED_UP = "the name '{}' can't be looked up (check {} and the DNS)"


class Scripted(Fake):
    """Answers whatever comes with one text after the other, byte by byte if there is a pause, and hangs up; .gone tells that it has."""

    def __init__(self, *answers, pause=0):
        self.answers, self.pause = answers, pause
        super().__init__()

    def serve(self, sock):
        with sock, contextlib.suppress(OSError):
            for answer in self.answers:
                sock.recv(65536)
                for part in split(answer, 1) if self.pause else [answer]:
                    sock.sendall(part)
                    self.gone.wait(self.pause)
        self.gone.set()


@table({  # (the upstream and the proxy before it, in which {} is a port; what listens there: what a user is told)
    "a name": ("http://no-such-host.invalid:1", "", None, LOOKED_UP.format("no-such-host.invalid", "the address")),
    "refused": ("http://127.0.0.1:{}", "", None, "127.0.0.1 refused the connection (check that it runs, and the port)"),
    "a certificate": ("https://127.0.0.1:{}", "", "tls", "the certificate of 127.0.0.1 can't be verified: "),
    "no TLS": ("https://127.0.0.1:{}", "", "plain", "127.0.0.1 does not speak TLS"),
    "a refusal of TLS": ("https://127.0.0.1:{}", "", "alert", "handshake failure)"),
    "a proxy": ("https://a.b", "http://127.0.0.1:{}", "plain", "the proxy 127.0.0.1 refused the connection with status 407"),
    "a proxy that is none": ("https://a.b", "http://127.0.0.1:{}", "ssh", "the proxy 127.0.0.1 does not answer as an HTTP proxy does (check PROXY)"),
    "a proxy that is down": ("https://a.b", "http://127.0.0.1:{}", None, "the proxy 127.0.0.1 refused the connection (check that it runs"),
    "a proxy's name": ("https://a.b", "http://no-such-host.invalid:1", None, LOOKED_UP.format("no-such-host.invalid", "PROXY")),
    "a SOCKS proxy's name": ("https://a.b", "socks5://no-such-host.invalid:1", None, LOOKED_UP.format("no-such-host.invalid", "PROXY")),
    "a name before SOCKS": ("https://no-such-host.invalid", "socks5://localhost:{}", "socks", LOOKED_UP.format("no-such-host.invalid", "the address")),
    "a SOCKS proxy that hangs up": ("https://a.b", "socks5h://127.0.0.1:{}", "cut", "the proxy 127.0.0.1 can't reach it (SOCKS reply 255)"),
    "a certificate behind a proxy": ("https://127.0.0.1:{}", "http://localhost:{}", "tls proxy", "the certificate of 127.0.0.1 can't be verified: "),
    "a certificate behind SOCKS": ("https://127.0.0.1:{}", "socks5h://localhost:{}", "tls socks", "the certificate of 127.0.0.1 can't be verified: "),
})
def test_an_unreachable_upstream_is_explained_with_its_host(url, proxy, kind, words, pool, tmp_path, caplog):
    makers = {"tls": lambda: TLSOpenAI(tmp_path), "socks": SocksServer, "proxy": ForwardProxy,
              "plain": lambda: Scripted(b"HTTP/1.1 407 Say who you are\r\n\r\n"), "cut": lambda: Scripted(b"\5\0", b""),
              "ssh": lambda: Scripted(b"SSH-2.0-OpenSSH\r\n"), "alert": lambda: Scripted(b"\x15\x03\x03\0\2\2\x28")}     # handshake_failure
    fakes = [makers[name]() for name in (kind or "").split()]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [fake.port for fake in fakes] or [closed.getsockname()[1]]
    server = pool((fakes[0] if fakes else Scripted(), {"base_url": url.format(*ports) + "/v1", "proxy": proxy.format(ports[-1])}))
    got = chat(server, BOTH)
    status, = ask(server, path="/status").json["controllers"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("a could not be reached: "), warnings
    for text in (got.json["error"]["message"], status["last_error"], *warnings):
        assert words in text and "Say who" not in text and "Traceback" not in text and ("TLS failed (" in text) == (kind == "alert"), text
    assert (got.status, got.json["error"]["code"]) == (502, "upstream_error")
    assert not any(str(port) in got.body.decode() for port in ports)


@table({  # (the upstream, the proxy before it, in which {} is the port of what answers): its bytes
    "CONNECT": ("https://a.b", "http://127.0.0.1:{}", b"HTTP/1.1 200 " + b"x" * 60000),
    "headers of CONNECT": ("https://a.b", "http://127.0.0.1:{}", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10000),
    "SOCKS": ("http://127.0.0.1:1", "socks5h://127.0.0.1:{}", b"\5\0", b"\5\0\0\3\xff" + b"x" * 257),
    "TLS": ("https://127.0.0.1:{}", "", b"\x16\x03\x03\x3f\xff\2\0\x3f\xfb" + b"x" * 16000),
})
def test_the_time_to_connect_is_that_of_all_handshakes_together(case, pool):
    url, proxy, *answers = case
    slow = Scripted(*answers, pause=0.02)
    server = pool((slow, {"base_url": url.format(slow.port) + "/v1", "proxy": proxy.format(slow.port)}), connect_timeout=0.1)
    started = time.monotonic()
    got = chat(server, BOTH)
    assert (got.status, got.json["error"]["message"]) == (504, "a could not be reached in time.") and time.monotonic() - started < 3
    wait_for(slow.gone.is_set)


@contextlib.contextmanager
def deaf_port():
    """The port of a socket that accepts no more connections, and refuses none."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize("url, proxy", [("http://127.0.0.1:{}", ""), ("https://127.0.0.1:{}", ""), ("https://a.b", "http://127.0.0.1:{}"), ("https://a.b", "socks5h://127.0.0.1:{}")])
@pytest.mark.parametrize("listens", [False, True])
def test_a_client_that_leaves_is_connected_for_no_longer(url, proxy, listens, pool):
    silent, before = FakeOpenAI(), akashproxy.CancelScope.active.copy()
    silent.serve = stalled
    with deaf_port() as port:
        port = silent.port if listens else port
        server = pool((silent, {"base_url": url.format(port) + "/v1", "proxy": proxy.format(port)}), connect_timeout=60)
        with connect(server, post("/v1/chat/completions", BOTH)):
            wait_for(lambda: akashproxy.CancelScope.active - before and (silent.open or not listens))
        settle(server)
        assert not akashproxy.CancelScope.active - before


def test_the_next_address_of_a_name_is_tried(fake, monkeypatch):
    with socket.create_server(("127.0.0.2", 0)) as closed:
        nobody = closed.getsockname()
    look_up = socket.getaddrinfo
    unusable = [(9999, socket.SOCK_STREAM, 0, "", ("::1", 1))]      # such as IPv6 on a host without it
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: unusable + look_up(*nobody, 0, socket.SOCK_STREAM) + look_up("127.0.0.1", fake.port, 0, socket.SOCK_STREAM))
    scope = akashproxy.CancelScope()
    with akashproxy.connect_within(scope, ("two.example", fake.port), 5) as sock:
        assert sock.getpeername() == ("127.0.0.1", fake.port) and 0 < scope.deadline - time.monotonic() <= 5
    scope.detach()


class TLSOpenAI(FakeOpenAI):
    """The same behind TLS, with a certificate of an authority that only the tests know."""

    def __init__(self, folder):
        import ssl
        (folder / "server.pem").write_text(TLS_SERVER)
        (folder / "ca.pem").write_text(TLS_AUTHORITY)
        self.ca_file = str(folder / "ca.pem")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "server.pem")
        super().__init__()
        self.url = self.url.replace("http:", "https:")

    def serve(self, sock):
        with contextlib.suppress(OSError):
            super().serve(self.context.wrap_socket(sock, server_side=True))


def test_tls_is_verified_and_a_private_authority_can_be_named(pool, tmp_path):
    fake = TLSOpenAI(tmp_path)
    got = chat(pool(fake), BOTH)
    assert got.status == 502 and "could not be reached" in got.json["error"]["message"] and not fake.requests
    server = pool(fake, ca_file=fake.ca_file)
    assert chat(server, BOTH).status == 200 and chat(server, BOTH).status == 200
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in sse(chat(server, BOTH, stream=True).body)) == "Hi there."
    fake.faults.append(fake.stall(1))
    with connect(server, post("/v1/chat/completions", {**BOTH, "stream": True})) as sock:
        sock.recv(100)
    wait_for(fake.gone.is_set)
    wrong = pool((fake, {"base_url": fake.url.replace("127.0.0.1", "127.0.0.2") + "/v1"}), ca_file=fake.ca_file)
    assert chat(wrong, BOTH).status == 502, "another host's certificate"


def test_a_reload_reads_the_certificates_again(pool, tmp_path):
    fake, bundle = TLSOpenAI(tmp_path), tmp_path / "bundle.pem"
    bundle.write_text(OTHER_AUTHORITY)
    server = pool(fake, ca_file=str(bundle))
    assert chat(server, BOTH).status == 502
    bundle.write_text(TLS_AUTHORITY)
    assert chat(server, BOTH).status == 502
    server.reload(dataclasses.replace(server.settings))
    assert chat(server, BOTH).status == 200
    bundle.write_text("broken")
    with pytest.raises(ConfigError):
        dataclasses.replace(server.settings)
    fake.hang_up()
    assert chat(server, BOTH).status == 200, "a file with mistakes changes nothing"


def test_a_proxy_on_the_way(fake, pool, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")     # concerns the environment's proxies only
    plain, connect, upstream = ForwardProxy(), ForwardProxy(), TLSOpenAI(tmp_path)
    assert chat(pool((fake, {"proxy": f"http://us%40er:p%3Aw@127.0.0.1:{plain.port}", "api_key": "k"})), BOTH).status == 200
    request = plain.requests[0]
    assert (request.method, request.path) == ("POST", f"{fake.url}/v1/chat/completions")
    assert base64.b64decode(request.headers["proxy-authorization"].split()[1]) == b"us@er:p:w"
    server = pool((upstream, {"proxy": f"http://u:p@127.0.0.1:{connect.port}"}), ca_file=upstream.ca_file)
    assert statuses(server, 2) == [200, 200]
    assert [(request.method, request.path) for request in connect.requests] == [("CONNECT", f"127.0.0.1:{upstream.port}")]
    assert connect.requests[0].headers["proxy-authorization"].startswith("Basic ")
    assert {request.headers["host"] for request in upstream.requests} == {f"127.0.0.1:{upstream.port}"}
    assert not any("proxy-authorization" in request.headers for request in upstream.requests)


# == reloading ================================================================================


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_sighup_reloads_and_a_broken_file_changes_nothing(config, a, b):
    path = config({"controllers": [{"name": "a", "base_url": a.url}]})
    (first, *others), hold, lines = a.events(), threading.Event(), []
    with started("--config-file", path) as (process, server):
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        a.faults.append(a.steps(a.head() + chunk(first), hold, chunks(*others)))
        running = later(chat, server, BOTH, stream=True)
        wait_for(lambda: a.bodies())
        config({"controllers": [{"name": "b", "base_url": b.url}]})
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: route_of(chat(server, BOTH)) == "b=200")
        config("{")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("stay as they were" in line for line in lines))
        assert route_of(chat(server, BOTH)) == "b=200"
        hold.set()
        assert b"[DONE]" in running.result().body, "an open stream goes on"


def test_a_reload_without_its_file_changes_nothing(config, tmp_path):
    path = config({"bearer_token": "t", "controllers": [{"type": "echo"}]})
    with started(popen={"cwd": tmp_path}) as (process, server):
        os.unlink(path)
        process.send_signal(signal.SIGHUP)
        assert "stay as they were" in process.stderr.readline()
        assert ask(server, path="/status").status == 401


def test_a_reload_reaches_open_connections(pool):
    server = pool(FakeOpenAI(), bearer_token=("old",))
    with link_to(server) as link:
        assert ask_again(link, path="/status", headers={"Authorization": "Bearer old"}).status == 200
        server.reload(dataclasses.replace(server.settings, bearer_token=("new",)))
        assert ask_again(link, path="/status", headers={"Authorization": "Bearer old"}).status == 401
        assert ask_again(link, path="/status", headers={"Authorization": "Bearer new"}).status == 200


def test_a_reload_keeps_who_did_not_change(a, b, pool):
    server = pool(a.faulting(a.status(429, extra=b"Retry-After: 99\r\n")), b)
    assert chat(server, BOTH).status == 200
    before = server.pool.upstreams
    changed = dataclasses.replace(before[1].options, weight=3)
    server.reload(dataclasses.replace(server.settings, controllers=(before[0].options, changed)))
    assert server.pool.upstreams[0] is before[0] and server.pool.upstreams[1].options.weight == 3
    assert ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] > 90


@table({
    # name: (settings that change, settings of the controller that change, is the cool-down forgotten)
    "nothing": ({}, {}, False), "a setting of the server": ({"max_wait": 1.0}, {}, False), "a weight": ({}, {"weight": 2.0}, False),
    "a list of models": ({}, {"models": ("both",)}, False), "an akash cookie": ({"akash_cookie": "a=b"}, {}, "akash"),
    "an address": ({}, {"base_url": "http://127.0.0.1:2"}, True), "a key": ({}, {"api_key": "new"}, True),
    "a proxy": ({}, {"proxy": "http://127.0.0.1:3"}, True), "a cookie": ({}, {"cookie": "a=b"}, True), "header fields": ({}, {"headers": {"X-Org": "b"}}, True),
    "the user agent": ({"user_agent": "other"}, {}, True),
})
@pytest.mark.parametrize("kind", ["akash", "openai"])
def test_a_reload_that_changes_the_way_forgets_cool_downs(changes, of_controller, forgotten, kind):
    options = akashproxy.ControllerSettings(type=kind, name="a", base_url="http://127.0.0.1:1", api_key="old")
    settings = Settings(controllers=(options,), max_wait=0.0, akash_base_url=options.base_url)
    before = akashproxy.Pool(settings, clock=Clock())
    attempt(before, stop_of(429, retry_after=14400))
    after = akashproxy.Pool(dataclasses.replace(settings, controllers=(dataclasses.replace(options, **of_controller),), **changes),
                            before, clock=before.clock)
    assert (after.status()[0]["rests_for_seconds"] == 0) == (forgotten is True or forgotten == kind)


@pytest.mark.parametrize("before, after", [("", "prompt"), ("prompt", ""), ("prompt", "refuse"), ("refuse", "prompt")])
def test_a_reload_that_changes_tools_keeps_login_and_cool_downs(before, after, akash):
    akash.me = signed_in("appSession=two")
    options = akashproxy.ControllerSettings(type="akash", base_url=akash.url, cookie="appSession=one", tools=before)
    old = akashproxy.Pool(Settings(controllers=(options,)), clock=Clock())
    old.on_tick(0)
    wait_for(lambda: old.status()[0]["login"] == "active")
    attempt(old, stop_of(429, retry_after=14400))
    new = akashproxy.Pool(Settings(controllers=(dataclasses.replace(options, tools=after),)), old, clock=old.clock)
    status, upstream = new.status()[0], new.upstreams[0]
    assert status["login"] == "active" and status["rests_for_seconds"] > 90
    assert upstream.controller.login.cookie == "appSession=two"
    call = Call({"model": "Qwen/Qwen3", **TOOL_REQUESTS["/v1/chat/completions"]})
    assert (upstream.adapted.check_support(call) is None) == (after == "prompt")
    changed = akashproxy.Pool(Settings(controllers=(dataclasses.replace(options, cookie="appSession=other"),)), new)
    assert changed.upstreams[0].controller.login.cookie == "appSession=other" and changed.status()[0]["login"] == "unknown"


# A key and certificates that only this file uses: an authority with a server on loopback, and another authority.

def pem(kind, data):
    return f"-----BEGIN {kind}-----\n" + "\n".join(split(data, 64)) + f"\n-----END {kind}-----\n"


TLS_AUTHORITY = pem(
    "CERTIFICATE", "MIIBrzCCAVWgAwIBAgIUeEs9v++DWzZIJNAgEtW6Z2SWOrgwCgYIKoZIzj0EAwIwJDEiMCAGA1UEAwwZYWthc2hwcm94eSB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjEyMjQ1MTJaGA"
    "8yMTI2MTAyODIyNDUxMlowJDEiMCAGA1UEAwwZYWthc2hwcm94eSB0ZXN0IGF1dGhvcml0eTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJoQVOHc05Vf/PO9NQFd7w2RXzwSVdds"
    "92N1tHk/W+HtJpnD8riMTQ3Xg/vX0fcUmugDFBm779T1d8uxf/CJZxajYzBhMB0GA1UdDgQWBBSXjCjuNC1ZhI/bM3QLyCwy7sSkyzAfBgNVHSMEGDAWgBSXjCjuNC1ZhI/bM3QLyC"
    "wy7sSkyzAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwICBDAKBggqhkjOPQQDAgNIADBFAiBCNEvDy1QYlMCMbVxzydgDhOwSTehhObC1aoCR0czzGQIhAOKWp47MbNgaPXzh"
    "eKSlsFMUNn5CV8hyHRln9f9DqDgv")
OTHER_AUTHORITY = pem(
    "CERTIFICATE", "MIIBjzCCATWgAwIBAgIUKc2NfqG9pG2PvzP0gOLdW4HRaj8wCgYIKoZIzj0EAwIwHDEaMBgGA1UEAwwRYW5vdGhlciBhdXRob3JpdHkwIBcNMjYxMTI2MjMwNjIyWhgPMjEyNjExMD"
    "IyMzA2MjJaMBwxGjAYBgNVBAMMEWFub3RoZXIgYXV0aG9yaXR5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEK9PH3rFpR0Lm6yFMWd4i2Tu49/L2zNlKZ38lcPWF77IT9VCaBiFi"
    "T5JPa+cKUm6fEZUBUETZXD0KcOAjgmY8caNTMFEwHQYDVR0OBBYEFHrhh270tcZJDKsXKdtnoL1qHRorMB8GA1UdIwQYMBaAFHrhh270tcZJDKsXKdtnoL1qHRorMA8GA1UdEwEB/w"
    "QFMAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIgBhiMbMwg5DQxI7FGPOu6MBdlJh9ND+8MtHSYDewMCSECIQCAhuXJFGtv6c6eDWLlUqA2woAUeNgIFCxa745Y7P9Fhw==")
TLS_SERVER = pem(
    "EC PRIVATE KEY", "MHcCAQEEIGEmJe/FhnMyin0o413vPw6OeQgbNKEaXUCei6VLWYw0oAoGCCqGSM49AwEHoUQDQgAEToVDgBdPyAN28VlEZwes7KfblxbaA/sagSkxL2g3kCfHys6vbRUp8M5in8VoHN"
    "WUlQvF87lj0IcYC/PHVHLAMw==") + pem(
    "CERTIFICATE", "MIIByzCCAXKgAwIBAgIUWfZTguolKdQqLU88QJpwfi9dzmMwCgYIKoZIzj0EAwIwJDEiMCAGA1UEAwwZYWthc2hwcm94eSB0ZXN0IGF1dGhvcml0eTAgFw0yNjExMjEyMjQ1MTJaGA"
    "8yMTI2MTAyODIyNDUxMlowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEToVDgBdPyAN28VlEZwes7KfblxbaA/sagSkxL2g3kCfHys6vbRUp"
    "8M5in8VoHNWUlQvF87lj0IcYC/PHVHLAM6OBjzCBjDAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDgYDVR0PAQH/BAQDAgeAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMAkGA1UdEw"
    "QCMAAwHwYDVR0jBBgwFoAUl4wo7jQtWYSP2zN0C8gsMu7EpMswHQYDVR0OBBYEFDIXr8WOZqN63nGw7SqeLnQ/ib/jMAoGCCqGSM49BAMCA0cAMEQCIEIIqQKT58eIka4gYUrY7T/E"
    "yw4ZzoVa8IVZ3SqBsPotAiAJZNxVwCmKC3KuK9t5ulgM8vS76LCtdFIJaWHvs6GBkQ==")


# == attacks, slow clients and faults =========================================================

GET, HOST = b"GET /health HTTP/1.1\r\n", b"Host: x\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
CLOSED, OPEN = False, True
DATA = json.dumps(CHAT).encode()
SIZED = b"Content-Length: %d\r\n" % len(DATA)
CHUNKS = b"Transfer-Encoding: chunked\r\n"


def in_chunks(body, *fields):
    return POST + CHUNKS + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def first_line(line, *fields, host=HOST):
    return line + b"\r\n" + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def get(*fields, host=HOST):
    return first_line(GET[:-2], *fields, host=host)


def target(path):
    return first_line(b"GET " + path + b" HTTP/1.1")


def of_length(length, data=b""):
    return POST + b"Content-Length: " + length + b"\r\n\r\n" + data


def of_coding(coding, data=b""):
    return POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + data


def spelled(body):
    return of_length(b"%d" % len(body), body)


def refused_as(status, attacks):
    return {name: (data, status, CLOSED) for name, data in attacks.items()}


# -- what one client sends

ATTACKS = {
    # name: (bytes, status, is the connection usable afterwards?)
    "a good request": (get(), 200, OPEN), "a good body": (POST + SIZED + b"\r\n" + DATA, 200, OPEN),
    "a good body in chunks": (in_chunks(chunks(DATA)), 200, OPEN),
    # -- the request line
    "HTTP/0.9": (first_line(b"GET /health HTTP/0.9"), 505, CLOSED), "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, CLOSED),
    "HTTP/1.2 is a 1.1": (first_line(b"GET /health HTTP/1.2"), 200, OPEN), "HTTP/3.0": (first_line(b"GET /health HTTP/3.0"), 505, CLOSED),
    "an unknown method": (first_line(b"BREW /health HTTP/1.1"), 405, OPEN),
    "a method in small letters": (first_line(b"get /health HTTP/1.1"), 405, OPEN), "TRACE": (first_line(b"TRACE /health HTTP/1.1"), 405, OPEN),
    **refused_as(400, {
        "no version": b"GET /health\r\n\r\n", "an empty line of blanks": b"  \r\n\r\n", "HTTP/1": first_line(b"GET /health HTTP/1"),
        "HTTP/1.10": first_line(b"GET /health HTTP/1.10"), "HTTP/01.1": first_line(b"GET /health HTTP/01.1"),
        "http/1.1": first_line(b"GET /health http/1.1"), "HTTP/1.1 and a blank": first_line(b"GET /health HTTP/1.1 "),
        "two blanks": first_line(b"GET  /health HTTP/1.1"), "a tab": first_line(b"GET\t/health HTTP/1.1"),
        "a blank first": first_line(b" GET /health HTTP/1.1"), "four words": first_line(b"GET /health x HTTP/1.1"),
        "a method with a colon": first_line(b"GE:T /health HTTP/1.1"), "a method of 33 letters": first_line(b"G" * 33 + b" /health HTTP/1.1"),
        "CONNECT": first_line(b"CONNECT x:80 HTTP/1.1")}),
    # -- the target
    "OPTIONS and a star": (first_line(b"OPTIONS * HTTP/1.1"), 204, OPEN), "absolute": (target(b"http://x/health"), 200, OPEN),
    "absolute, another host": (target(b"http://evil:1/health"), 200, OPEN), "absolute without a path": (target(b"http://x"), 200, OPEN),
    "percent once": (target(b"/heal%74h"), 200, OPEN), "percent twice": (target(b"/heal%2574h"), 404, OPEN),
    "percent NUL": (target(b"/health%00"), 404, OPEN), "percent CR LF without a blank": (target(b"/health%0d%0aX:y"), 404, OPEN),
    "half a percent": (target(b"/health%"), 404, OPEN), "a raw UTF-8 path": (target("/hé".encode()), 404, OPEN),
    "dots": (target(b"/v1/../health"), 404, OPEN), "two slashes": (target(b"//health"), 404, OPEN), "a fragment": (target(b"/health#x"), 404, OPEN),
    "a query": (target(b"/health?x=%00&y"), 200, OPEN), "a semicolon": (target(b"/health;x=1"), 404, OPEN),
    "a host within the path": (target(b"/http://evil/"), 404, OPEN), "a long target": (target(b"/" + b"x" * 60000), 404, OPEN),
    "too long a target": (target(b"/" + b"x" * 70000), 431, CLOSED),
    **refused_as(400, {
        "no slash": target(b"health"), "a star": target(b"*"), "another scheme": target(b"ftp://x/health"), "NUL in the target": target(b"/hea\0lth"),
        "a control character in the target": target(b"/hea\x01lth"), "DEL in the target": target(b"/hea\x7flth"),
        "percent CR LF": target(b"/health%0d%0aX: y")}),
    # -- fields
    "an empty value": (get(b"X:"), 200, OPEN), "blanks around a value": (get(b"X: \t y \t"), 200, OPEN),
    "UTF-8 in a value": (get("X: é".encode()), 200, OPEN), "100 fields": (get(*[b"X: y"] * 99), 200, OPEN),
    "101 fields": (get(*[b"X: y"] * 100), 431, CLOSED), "a value of 60 kB": (get(b"X: " + b"y" * 60000), 200, OPEN),
    "a value of 70 kB": (get(b"X: " + b"y" * 70000), 431, CLOSED), "a line without an end": (b"G" * 70000, 431, CLOSED),
    **refused_as(400, {
        "no colon": get(b"X"), "no name": get(b": y"), "a blank before the colon": get(b"X : y"), "a tab before the colon": get(b"X\t: y"),
        "a name in quotes": get(b'"X": y'), "a name with a slash": get(b"X/Y: y"), "a name beyond ASCII": get("é: y".encode()),
        "a first line that is folded": GET + b" Host: x\r\n\r\n", "obs-fold": get(b"X: y\r\n z"), "obs-fold with a tab": get(b"X: y\r\n\tz"),
        "NUL in a value": get(b"X: y\0z"), "a control character in a value": get(b"X: \x01"), "DEL in a value": get(b"X: \x7f"),
        "bare LF between fields": GET + b"Host: x\nX: y\r\n\r\n", "bare LF everywhere": b"GET /health HTTP/1.1\nHost: x\n\n",
        "bare LF at the end": GET + HOST + b"\n", "bare CR everywhere": b"GET /health HTTP/1.1\rHost: x\r\r", "bare CR in a value": get(b"X: a\rb"),
        "bare CR between fields": GET + b"Host: x\rX: y\r\n\r\n", "CR CR LF": GET + b"Host: x\r\r\n\r\n"}),
    # -- Host
    "no host in 1.0": (first_line(b"GET /health HTTP/1.0", host=b""), 200, CLOSED),
    "another option in 1.0": (first_line(b"GET /health HTTP/1.0", b"Connection: te"), 200, CLOSED),
    "an empty host": (get(host=b"Host:\r\n"), 200, OPEN), "a host in brackets": (get(host=b"Host: [::1]:80\r\n"), 200, OPEN),
    **refused_as(400, {
        "no host": get(host=b""), "two hosts": get(b"Host: y"), "two equal hosts": get(b"Host: x"), "a host with a blank": get(host=b"Host: a b\r\n"),
        "a host with a path": get(host=b"Host: a/b\r\n"), "a host with an at": get(host=b"Host: a@b\r\n"),
        "a host that is a list": get(host=b"Host: a, b\r\n"), "a host that is a list without blanks": get(host=b"Host: a,b\r\n"),
        "a host in angle brackets": get(host=b"Host: <b>x\r\n"), "a host with a quote": get(host=b'Host: x"\r\n')}),
    # -- lengths
    "no length": (POST + b"\r\n", 400, OPEN), "a length of 0": (of_length(b"0"), 400, OPEN),
    "a length beyond the limit": (of_length(b"999999999"), 413, CLOSED),
    "a length on GET": (get(b"Content-Length: 5") + b"hello", 200, OPEN), "chunks on GET": (get(CHUNKS[:-2]) + chunks(b"hello"), 200, OPEN),
    "a length and less": (POST + SIZED + b"\r\n" + DATA[:-1], 408, CLOSED),
    **refused_as(400, {
        "a negative length": of_length(b"-1"), "a signed length": of_length(b"+5", b"hello"),
        "a length with an underscore": of_length(b"1_0", b"0123456789"), "a hexadecimal length": of_length(b"0x5", b"hello"),
        "a length of words": of_length(b"five", b"hello"), "an empty length": POST + b"Content-Length:\r\n\r\n",
        "a fraction": of_length(b"5.0", b"hello"), "Arabic digits": POST + "Content-Length: ٥\r\n\r\nhello".encode(),
        "two lengths": of_length(b"5\r\nContent-Length: 6", b"hello"), "two equal lengths": of_length(b"5\r\nContent-Length: 5", b"hello"),
        "a list of lengths": of_length(b"5, 5", b"hello"), "a length of 19 digits": of_length(b"9999999999999999999"),
        "both lengths": POST + SIZED + CHUNKS + b"\r\n" + chunks(DATA), "both lengths, the other way": POST + CHUNKS + SIZED + b"\r\n0\r\n\r\n"}),
    # -- codings
    "gzip": (of_coding(b"gzip"), 501, CLOSED), "gzip, chunked": (of_coding(b"gzip, chunked", b"0\r\n\r\n"), 501, CLOSED),
    "chunked, chunked": (of_coding(b"chunked, chunked", b"0\r\n\r\n"), 501, CLOSED),
    "chunked twice": (POST + CHUNKS + CHUNKS + b"\r\n0\r\n\r\n", 501, CLOSED), "identity": (of_coding(b"identity"), 501, CLOSED),
    "xchunked": (of_coding(b"xchunked", b"0\r\n\r\n"), 501, CLOSED),
    "chunked in quotes": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', 501, CLOSED),
    "chunked; q=1": (of_coding(b"chunked;q=1", b"0\r\n\r\n"), 501, CLOSED), "an empty coding": (POST + b"Transfer-Encoding:\r\n\r\n", 501, CLOSED),
    "Chunked": (of_coding(b"Chunked") + chunks(DATA), 200, OPEN),
    **refused_as(400, {
        "chunked and a vertical tab": of_coding(b"\x0bchunked", b"0\r\n\r\n"),
        "chunked in 1.0": POST.replace(b"1.1", b"1.0") + CHUNKS + b"\r\n" + chunks(DATA)}),
    # -- chunks
    "no chunk": (in_chunks(b"0\r\n\r\n"), 400, OPEN), "an extension": (in_chunks(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(DATA), DATA)), 200, OPEN),
    "a quoted extension": (in_chunks(b'%x ; a="b;c"\r\n%b\r\n0\r\n\r\n' % (len(DATA), DATA)), 200, OPEN),
    "leading zeros": (in_chunks(b"000%x\r\n%b\r\n000\r\n\r\n" % (len(DATA), DATA)), 200, OPEN),
    "trailers": (in_chunks(chunk(DATA) + b"0\r\nX: y\r\nContent-Length: 99\r\n\r\n"), 200, OPEN),
    "101 trailers": (in_chunks(chunk(DATA) + b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"), 431, CLOSED),
    "a size beyond the limit": (in_chunks(b"fffffff\r\n"), 413, CLOSED), "no last chunk": (in_chunks(chunk(DATA)), 408, CLOSED),
    **refused_as(400, {
        "a broken trailer": in_chunks(chunk(DATA) + b"0\r\nX y\r\n\r\n"), "a chunk too short": in_chunks(b"5\r\nhell\r\n0\r\n\r\n"),
        "a chunk too long": in_chunks(b"5\r\nhello!\r\n0\r\n\r\n"), "a negative chunk": in_chunks(b"-5\r\nhello\r\n0\r\n\r\n"),
        "a chunk of 0x": in_chunks(b"0x5\r\nhello\r\n0\r\n\r\n"), "a chunk with an underscore": in_chunks(b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"),
        "a chunk with a blank first": in_chunks(b" 5\r\nhello\r\n0\r\n\r\n"), "a chunk without a size": in_chunks(b"\r\nhello\r\n0\r\n\r\n"),
        "a size of 16 digits": in_chunks(b"f" * 16 + b"\r\nhello"), "a bare LF after a size": in_chunks(b"5\nhello\r\n0\r\n\r\n"),
        "a bare LF in an extension": in_chunks(b"5;a\nb\r\nhello\r\n0\r\n\r\n"), "a bare CR after a size": in_chunks(b"5\rhello\r\n0\r\n\r\n"),
        "a bare LF after a chunk": in_chunks(b"5\r\nhello\n0\r\n\r\n"), "bare LF for all of the framing": in_chunks(b"5\nhello\n0\n\n"),
        "a chunk that goes on without an end": in_chunks(b"5\r\nhello!"), "an endless extension": in_chunks(b"5;" + b"x" * 9000)}),
    # -- expectations
    "Expect: 100-continue": (POST + SIZED + b"Expect: 100-Continue\r\n\r\n" + DATA, 200, OPEN),
    "an announced body that is too large": (of_length(b"999999999\r\nExpect: 100-continue"), 413, CLOSED),
    "100-continue when the chunks are here": (in_chunks(chunks(DATA), b"Expect: 100-continue"), 200, OPEN),
    "another expectation": (POST + SIZED + b"Expect: tea\r\n\r\n" + DATA, 417, CLOSED),
    "an expectation in 1.0": (POST.replace(b"1.1", b"1.0") + SIZED + b"Expect: tea\r\n\r\n" + DATA, 200, CLOSED),
    # -- bodies
    "overlong UTF-8": (spelled(b'{"model":"\xc0\xaf"}'), 400, OPEN), "a byte order mark": (spelled(b"\xef\xbb\xbf" + DATA), 200, OPEN),
    "a lone surrogate": (spelled(DATA.replace(b"Hello", b"\\ud800")), 200, OPEN),
    "a lone surrogate in the model": (spelled(DATA.replace(b"Meta", b"\\udfff")), 200, OPEN),
    "duplicate keys": (spelled(b'{"model":"x","model":"y",' + DATA[1:]), 200, OPEN),
    "NUL in JSON": (spelled(DATA.replace(b"Hello", b"\0")), 400, OPEN), "NUL escaped": (spelled(DATA.replace(b"Hello", b"\\u0000")), 200, OPEN),
    "JSON and more": (spelled(DATA + b"{}"), 400, OPEN),
    "CR LF in a field that is named back": (spelled(DATA[:-1] + b',"a\\r\\nX-Evil: 1":1}'), 200, OPEN),
    # -- garbage
    "half a line": (b"GET /hea", 408, CLOSED), "half a head": (GET + HOST, 408, CLOSED),
    "many blank lines before a request": (b"\r\n" * 40000 + get(), 200, OPEN), "blank lines before a request": (b"\r\n\r\n\r\n" + get(), 200, OPEN),
    **refused_as(400, {
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "SSLv2": b"\x80\x2e\x01\x00\x02", "SSH": b"SSH-2.0-OpenSSH_9\r\n",
        "SMB": b"\0\0\0\x85\xffSMBr", "a single NUL": b"\0", "a single LF": b"\n", "Redis": b"*1\r\n$4\r\nPING\r\n",
        "the answer of a server": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"}),
    # -- what hides a second request
    "a GET after a 413": (of_length(b"999999999") + get(), 413, CLOSED), "a GET after a 501": (of_coding(b"x") + get(), 501, CLOSED),
    "a GET in the body of a 404": (first_line(b"POST /nowhere HTTP/1.1").replace(b"\r\n\r\n", b"\r\nContent-Length: 60\r\n\r\n") + get(), 404, CLOSED),
    "a GET in the body of a 405": (first_line(b"POST /health HTTP/1.1").replace(b"\r\n\r\n", b"\r\nContent-Length: 60\r\n\r\n") + get(), 405, CLOSED),
    **refused_as(400, {
        "a GET within a body that is refused": of_length(b"60\r\nTransfer-Encoding: chunked", b"0\r\n\r\n") + get(),
        "a GET after a bad chunk": in_chunks(b"z\r\n\r\n") + get(), "a GET after a bad field": get(b"X : y") + get()}),
}


@pytest.fixture(scope="module")
def target_servers():
    """A server that is patient, and one that is not."""
    fake = FakeAkash()
    servers = [Server(Settings(server_address="127.0.0.1:0", akash_base_url=fake.url, head_timeout=seconds,
                               body_timeout=seconds)).start() for seconds in (20, 0.1)]
    yield servers
    for server in servers:
        server.stop(0)
    fake.close()


def read_request(parts):
    """What the codec makes of a request that comes in some parts: its head, its body and what follows, or the status of its error."""
    pending, got, head, body = b"", b"", None, None
    try:
        for part in parts:
            pending += part
            end = -1 if head else akashproxy.find_head_end(pending, max(0, len(pending) - len(part) - 3))
            if end >= 0:
                head = akashproxy.parse_head(pending[:end], akashproxy.parse_request_line)
                body, pending = BodyDecoder(head[1]), pending[end + 4:]
            if body and not body.done:
                got += body.feed(pending)
                pending = body.trailing_data
    except ProtocolError as error:
        return error.status
    return head, got, body and body.done, pending


@table(ATTACKS)
def test_where_a_request_is_cut_changes_nothing(data, status, stays_open):
    data = data.lstrip(b"\r\n")
    complete = read_request([data])
    assert complete == status or not isinstance(complete, int)
    assert all(read_request(parts) == complete for parts in (pieces(data) if len(data) < 300 else [split(data, 1000)]))


@table(ATTACKS)
def test_attacks(data, status, stays_open, target_servers):
    target_server = target_servers[status == 408]
    marker = b"GET /status HTTP/1.1\r\nHost: x\r\nx-request-id: the-second\r\nConnection: close\r\n\r\n"
    if status == 408:       # what would come next would complete it
        got = talk(target_server, data)
    else:
        with contextlib.suppress(BrokenPipeError):
            got = talk(target_server, data + marker)
    assert status == 200 or b"100 Continue" not in got
    answers = re.findall(rb"HTTP/1\.1 (\d{3}) ", got)
    assert answers[:1] == [str(status).encode()], got[:500]
    assert (b"the-second" in got) == stays_open and len(answers) == 1 + stays_open, got[:900]
    assert b"X-Evil" not in got.split(b"\r\n\r\n")[0] and b"Traceback" not in got
    if not stays_open:
        assert b"\r\nConnection: close\r\n" in got
        single = got if status == 408 else talk(target_server, data)     # and at once, without more to be read
        assert re.findall(rb"HTTP/1\.1 (\d{3}) ", single)[-1:] == [str(status).encode()], single[:500]
    if status >= 400 and status != 405:
        assert json.loads(got.split(b"\r\n\r\n")[1].partition(b"HTTP/1.1 ")[0])["code"] == status


def test_a_refusal_reaches_a_client_that_goes_on_sending(serve):
    with connect(serve(), POST + b"Content-Length: 999999999\r\n\r\n") as sock:
        for _ in range(32):
            sock.sendall(b"x" * 65536)
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


# -- slow clients, and what is without an end


def test_500_slow_clients_change_nothing_for_the_next(akash, serve):
    server = serve(head_timeout=30)
    with crowd(server, 500, b"") as socks:
        for at, sock in enumerate(socks):
            sock.sendall([b"", b"G", b"GET /health HTTP/1.1\r\n", b"\r\n"][at % 4])
        threads = threading.active_count()
        assert stream(server)[0] == "Hello from the mock." and ask(server).status == 200
        for sock in socks[1::4]:
            sock.sendall(b"E")
        assert ask(server).status == 200
        assert threading.active_count() - threads < 5, "who waits has no thread"
        wait_for(lambda: len(server.connections) == 500)
    wait_for(lambda: not server.connections)


@pytest.mark.parametrize("begun", [b"\r\n\r\nGET / HT", b"\r\n\r\n\r\n", b"\r\n\r\n\r\n\r\nGET /health HTTP/1.1\r\n"])
def test_blank_lines_before_half_a_head_keep_nobody_waiting(begun, serve):
    server = serve()
    with connect(server, begun):
        wait_for(lambda: any(connection.state is akashproxy.State.READING for connection in server.connections.copy()))
        with link_to(server) as link:
            assert ask_again(link).status == 200


def test_blank_lines_alone_take_no_thread_and_buy_no_time(serve):
    server = serve(head_timeout=0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=0.05) as sock:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(socket.timeout):
                sock.sendall(b"\r\n")
                assert sock.recv(1) == b""
                break
        assert time.monotonic() < end and not server.workers.idle


def test_a_body_may_come_as_slowly_as_by_modem(serve):
    server = serve(body_timeout=0.4)
    data = json.dumps({**CHAT, "padding": "x" * 9000}).encode()
    with connect(server, POST + b"Content-Length: %d\r\n\r\n" % len(data)) as sock:
        for at in range(0, len(data), 1500):    # 15,000 bytes per second
            time.sleep(0.1)
            sock.sendall(data[at:at + 1500])
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_ends(serve):
    with connect(serve(keepalive_timeout=0.2), get()) as sock:
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert sock.recv(1) == b"", "closed without a word"


def test_a_client_that_does_not_read_is_dropped(pool):
    a = FakeOpenAI(text="word " * 60000)
    data = a.head() + chunks(*a.events())
    server = pool(a.sends(data), keys=keys("alice"), write_timeout=0.2)
    with lazy_stream(server, "Authorization: Bearer alice-key"):
        assert counts(server) == (1, 1, 0), "it is in flight until its answer is here"
        pending = max(len(connection.output) for connection in server.connections.copy())
        assert pending < 200000 < len(data), "a bounded part of it waits here"
        assert ask(server).status == 200
        wait_for(lambda: not server.connections)
    wait_for(lambda: not a.open)
    assert ask(server, path="/status", headers=bearer("alice")).json["controllers"][0]["in_flight"] == 0 and counts(server) == (0, 1, 0)


def test_a_client_that_does_not_read_its_picture_is_dropped(akash, serve):
    server = serve(write_timeout=0.2)
    akash.answers("/image/", akash.raw(reply(body=b"x" * (8 << 20), kind="image/png"), keep=True))
    with lazy_client(server, head_of("GET", "/images/x.png")):
        wait_for(lambda: any(connection.request for connection in server.connections.copy()))
        wait_for(lambda: not server.connections)
    wait_for(lambda: not akash.open)


@pytest.mark.parametrize("leaves", [False, True])
def test_clients_that_read_their_pictures_slowly_hold_no_worker(leaves, akash, serve):
    data = random.Random(7).randbytes(8 << 20)
    akash.answers("/image/", akash.raw(reply(body=data, kind="image/png"), keep=True))
    server, before = serve(), set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(lazy_client(server, head_of("GET", "/images/x.png", "Connection: close"))) for _ in range(8)]
        workers = lambda: [thread for thread in threading.enumerate() if thread.name == "akashproxy worker" and thread not in before]
        wait_for(lambda: sum(bool(connection.output) for connection in server.connections.copy()) == 8 and len(workers()) == server.workers.idle)
        assert max(len(connection.output) for connection in server.connections.copy()) < 1 << 20, "a bounded part of it waits here"
        if not leaves:
            clients[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            head, _, body = receive(clients[0]).partition(b"\r\n\r\n")
            assert unchunked(body) == data and b" 200 " in head
    settle(server)
    wait_for(lambda: not akash.open or not leaves)


@pytest.mark.parametrize("field, pause", [("Connection: keep-alive", 0), ("Connection: close", 0), ("Connection: close", 0.4)])
def test_a_slow_client_gets_the_end_of_its_stream(field, pause, pool):
    a = FakeOpenAI(text="word " * 60000)
    server = pool(a.sends(a.head() + chunks(*a.events())), idle_timeout=0.3)
    with lazy_stream(server, field) as sock:
        time.sleep(pause)       # longer than the upstream may be silent
        got = drain(sock)
    assert got.count(b"word ") == 60000 and got.count(b"data: [DONE]") == 1 and b"error" not in got
    settle(server)


@pytest.mark.parametrize("extra", [b"\r\n", head_of("GET", "/health")])
def test_what_a_client_sends_within_its_last_answer_does_not_destroy_that(extra, streamed, pool):
    count = 40000 if streamed else 2000000      # more than fits into the buffers on the way
    server = pool(FakeOpenAI(text="word " * count))
    with lazy_client(server, post("/v1/chat/completions", {**BOTH, "stream": streamed}, "Connection: close")) as sock:
        wait_for(lambda: any(connection.output for connection in server.connections.copy()))
        sock.sendall(extra)
        wait_for(lambda: all(connection.pipelined for connection in server.connections.copy()))
        began = receive(sock, lambda got: all(connection.request is None for connection in server.connections.copy()))     # the kernel has its end
        assert (began + receive(sock)).count(b"word ") == count
    settle(server)


def test_an_end_that_waits_for_its_client_waits_no_longer_than_that(pool):
    a = FakeOpenAI(text="word " * 30000)
    server = pool(a.sends(a.head() + chunks(*a.events())), write_timeout=0.2)
    with lazy_stream(server):
        pass
    settle(server)


def test_silence_after_a_pause_is_ended_too(pool):
    a = FakeOpenAI(text="word " * 30000)
    a.faults.append(a.stall(-2))
    with lazy_stream(pool(a, idle_timeout=0.2)) as sock:
        assert b"sent nothing for 0.2 seconds" in drain(sock)


@table({    # a dialect's method with a bug, and what an upstream sends to meet it
    "a token on the fast path": ({"token_frame": lambda self, token: 1 / 0}, b'0:"x"\n'),
    "events": ({"encode": lambda self, events: akashproxy.ChatCompletions.encode(self, events) if Text("xy") not in events else 1 / 0}, b'0:"x"\n0:"\\u0079"\n'),
})
def test_a_bug_within_a_stream_closes_both_ends(method, data, own, akash, serve, caplog):
    own(type("Buggy", (akashproxy.ChatCompletions,), method), "/v1/buggy")
    akash.faults.append(akash.stall(b'0:"one "\n'))
    server = serve(keys=keys("alice"), idle_timeout=20)
    with connect(server, post("/v1/buggy", {**CHAT, "stream": True}, "Authorization: Bearer alice-key")) as sock:
        wait_for(lambda: any(relay.fast_path for relay in relays(server)))
        assert counts(server) == (1, 1, 0)
        for link in list(akash.open):
            link.sendall(chunk(data))
        receive(sock)
    settle(server)
    wait_for(lambda: counts(server) == (0, 1, 0))
    assert "ZeroDivisionError" in caplog.text and ask(server).status == 200
    wait_for(lambda: samples(server, bearer("alice")).get(("akashproxy_requests_total", "/v1/buggy", "200", "akash")) == 1)


@pytest.mark.parametrize("path", WANTS)
def test_an_endless_answer_is_not_kept(path, akash, serve, monkeypatch):
    """Nor a stream of the APIs whose last events need the whole text."""
    monkeypatch.setattr(akashproxy, "MAX_BUFFERED_BODY", 1 << 20)
    stream = path != "/v1/chat/completions"
    akash.faults.append(akash.endless(STREAM_HEAD, chunk(b'0:"' + b"x" * 60000 + b'"\n')))
    got = ask(serve(), "POST", path, {**CHAT_BODY, "model": "m", "input": "hi", "max_tokens": 9 << 20, "stream": stream})
    assert got.status == (200 if stream else 502) and b"more than can be buffered" in got.body and len(got.body) < 9 << 20


def test_a_stream_of_messages_keeps_no_text():
    """Its blocks end without their text, so a long answer to a slow client needs no memory."""
    message = akashproxy.Messages({**ASKED, "stream": True, "thinking": {"type": "enabled", "budget_tokens": 1024}})
    tracemalloc.start()
    frames = sum(len(message.encode([kind(f"{i:09}" * 1000)])) for kind in (akashproxy.Reasoning, akashproxy.Text) for i in range(1000))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert frames > 17 << 20 and held < 1 << 20


def test_a_request_that_no_controller_can_serve_is_told_its_own_last_error(a, b, pool):
    server = pool(a.faulting(a.status(429, extra=LIMIT)), (b, {"priority": 2}))
    assert chat(server, BOTH).status == 200
    b.faults.append(b.status(429, extra=LIMIT))
    tried, later = chat(server, BOTH), chat(server, BOTH)
    busy = "All controllers for this model are cooling down or busy."
    assert tried.status == later.status == 429 and later.json["error"]["message"] == busy, "nobody else's words"
    assert tried.json["error"]["message"] == f"{busy} The last error: b: told"


def test_no_more_threads(serve):
    server = serve()
    with no_more_threads():
        assert chat(server).status == 503
        assert ask(server).status == 200    # its monitoring still works
    assert chat(server).status == 200 and server.workers.idle <= 1


class NamesItsThread(akashproxy.Handler):
    def do_GET(self):
        self.request.server.handled_by = threading.current_thread().name
        return super().do_GET()


def test_health_on_the_loop_and_a_subclass_on_a_worker():
    with Server(Settings(server_address="127.0.0.1:0")) as server:
        # each is dispatched within the response of the one before: no recursion, all are answered
        got = talk(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1500
                   + b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert got.count(b"HTTP/1.1 200 OK") == 1501 and got.count(b"is running") == 1500
        assert server.workers.idle == 0
    with Server(Settings(server_address="127.0.0.1:0"), NamesItsThread) as server:
        assert ask(server).status == 200 and server.handled_by == "akashproxy worker"


# The position of [DONE] in the data must not matter: the first one ends the answer.
def test_the_first_of_several_ends_of_a_relay():
    begin = b'data: {"choices":[{"delta":{"content":"[DONE] "},"finish_reason":null}]}\n\n'
    for data, passed_on in (
        (begin + b"data: [DONE]\n\ndata: [DONE]\n\n", begin + b"data: [DONE]\n\n"),
        (begin + b"data: [DONE]\n\n" + begin, begin + b"data: [DONE]\n\n"),
        (begin + b"data: [DONE]\n\n" + begin + b"data: [DONE]: x\n\n", begin + b"data: [DONE]\n\n"),
        (begin + b"data:" + b" " * 99 + b"[DONE]\n\ndata: [DONE]\n\n", begin + b"data:" + b" " * 99 + b"[DONE]\n\n"),
        (begin * 2, begin * 2),
    ):
        decoder = akashproxy.PassthroughDecoder("up", akashproxy.STREAM_ENDS["/v1/chat/completions"])
        assert b"".join(event.data for event in decoder.feed(data)) == passed_on and decoder.complete == (b"data: [DONE]" in data)


def test_too_many_connections(serve):
    server = serve(max_connections=3)
    with crowd(server, 3, b""):
        wait_for(lambda: len(server.connections) == 3)
        got = talk(server, b"")
        assert got.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in got and json.loads(got.partition(b"\r\n\r\n")[2])["code"] == 503
    wait_for(lambda: not server.connections)
    assert ask(server).status == 200


def test_a_prompt_of_20_megabytes(akash, serve):
    assert chat(serve(), messages=[user("x" * (20 << 20))]).status == 200
    assert len(akash.bodies()[0]["messages"][0]["content"]) == 20 << 20


# -- pings


@pytest.mark.parametrize("form, fill", [("comment", b": ping\n\n"), ("chunk", b'"delta":{"role":"assistant","content":""}'), ("off", None)])
def test_pings_fill_silence(form, fill, akash, serve):
    first, second = threading.Event(), threading.Event()
    akash.faults.append(akash.steps(first, STREAM_HEAD + chunk(b'0:"one "\n'), second, chunks(b'0:"two"\n' + STOP)))
    with connect(serve(heartbeat=0.03, pings=form), post("/v1/chat/completions", {**CHAT, "stream": True})) as sock:
        got = b""
        for go in (first, second):
            if fill:
                got += receive(sock, lambda part: part.count(fill) >= 2)
            else:
                time.sleep(0.12)
            go.set()
            got += receive(sock, b'"one "' if go is first else b"0\r\n\r\n")
    body = unchunked(got.partition(b"\r\n\r\n")[2])
    assert fill is not None or b": ping" not in body
    events = [json.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "one two" and body.endswith(b"data: [DONE]\n\n")


def test_an_error_after_pings_is_told_in_the_stream(akash, serve):
    akash.faults.append(akash.steps(0.15, reply(500)))
    got = chat(serve(heartbeat=0.05), stream=True)
    assert got.status == 200 and b": ping\n\n" in got.body and b'data: {"error":{' in got.body and got.body.endswith(b"data: [DONE]\n\n")


def test_failover_goes_on_behind_pings(a, b, pool):
    got = chat(pool((a.faulting(a.stall()), {"weight": 1000, "first_byte_timeout": 0.15}), b, heartbeat=0.05), BOTH, stream=True)
    assert got.status == 200 and got.body.startswith(b": ping\n\n") and b"from " in got.body and b"error" not in got.body


@table({
    # name: (path, first frames of an upstream, a frame that it repeats and of which nothing is sent to the client)
    "reasoning that Messages withholds": ("messages", b"", FakeOpenAI.event({"reasoning_content": "t"})),
    "reasoning in legacy completions": ("completions", b"", FakeOpenAI.event({"reasoning_content": "t"})),
    **{f"fragments that wait in {path}": (path, FakeOpenAI.event(calls((0, "c0", "f", '{"a"'), (1, "c1", "f", '{"b":"'))),
                                          FakeOpenAI.event(calls((1, None, None, "x")))) for path in ("messages", "responses")},
    "empty deltas": ("responses", FakeOpenAI.event({"content": "x"}), FakeOpenAI.event({})),
    "comments": ("messages", FakeOpenAI.event({"content": "x"}), b": keep-alive\n\n"),
})
def test_output_that_is_not_sent_is_silence(path, first, repeated, fake, pool):
    done = threading.Event()

    def withholding(sock, request):
        sock.sendall(fake.head() + chunk(first))
        while not done.wait(0.02):
            sock.sendall(chunk(repeated))
        sock.sendall(chunks(*FakeOpenAI.words("")))
        return True

    server = pool((fake.faulting(withholding), {"paths": ["/v1/chat/completions"]}), heartbeat=0.05, idle_timeout=9)
    body = {"messages": ASKED, "responses": WANTED, "completions": {"model": "both", "prompt": "hi"}}[path]
    ping = b"event: ping\n" if path == "messages" else b": ping\n"
    with connect(server, post(f"/v1/{path}", {**body, "stream": True})) as sock:
        receive(sock, lambda got: got.count(ping) >= 3)
        done.set()
        receive(sock, b"0\r\n\r\n")


@table({
    # name: (what an upstream sends before it waits, how many bytes of the next event, the ping)
    "an event": (FakeOpenAI.event({"content": "a"}), 0, b": ping\n\n"),
    "half a line": (FakeOpenAI.event({"content": "a"}), 20, b": ping\n\n"),
    "an event with an ID": (b"id: 1\n" + FakeOpenAI.event({"content": "a"}), 0, b": ping\n"),
    "an ID long ago": (b"id: 1\n" + FakeOpenAI.event({"content": "a"}) + FakeOpenAI.event({"content": "b"}), 0, b": ping\n"),
    "a part of an event": (FakeOpenAI.event({"content": "a"}) + b"event: message\n", 0, b": ping\n"),
})
def test_a_ping_never_cuts_or_ends_an_event(frames, begun, ping, fake, pool):
    done, end = threading.Event(), b"".join(FakeOpenAI.words("end"))
    fake.faulting(fake.steps(fake.head() + chunk(frames + end[:begun]), done, chunks(end[begun:])))
    with connect(pool(fake, heartbeat=0.05, idle_timeout=9), post("/v1/chat/completions", {**CHAT, "model": "both", "stream": True})) as sock:
        got = receive(sock, lambda got: got.partition(frames)[2].count(b": ping") >= 3)
        done.set()
        body = unchunked((got + receive(sock, b"0\r\n\r\n")).partition(b"\r\n\r\n")[2])
    after = body.partition(frames)[2]     # a ping may come before, too
    assert after.startswith(ping * 3) and after.replace(ping, b"") == end


def test_openais_client_reads_pings_behind_an_event_with_an_id(fake, pool):
    openai = pytest.importorskip("openai")
    fake.faults.append(fake.steps(fake.head() + chunk(b"id: 1\n" + fake.event({"content": "a"})), 0.3,
                                  chunks(b"id: 2\n" + fake.event({"content": "b"}, "stop") + b"data: [DONE]\n\n")))
    with openai.OpenAI(base_url=pool(fake, heartbeat=0.05).url + "/v1", api_key="none", max_retries=0) as client:
        texts = [piece.choices[0].delta.content for piece in client.chat.completions.create(**BOTH, stream=True)]
    assert "".join(text or "" for text in texts) == "ab"


# -- faults of an upstream at every place


FAULTS = {"cut": lambda sock: None, "reset": reset, "silence": stalled, "nonsense": lambda sock: sock.sendall(b"\xff\0zz")}


@pytest.mark.parametrize("kind", ["akash", "openai"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("two", [False, True])
def test_no_fault_at_any_place_loses_or_doubles_a_word(kind, fault, streamed, two, pool):
    """A cut at each seventh byte; the others at the beginning, in the middle and at the end of the head and the body."""
    text = "one two three four."
    first, model = (FakeAkash(), CHAT["model"]) if kind == "akash" else (FakeOpenAI(text=text), "both")
    if kind == "akash":
        head, body = STREAM_HEAD, chunks(*[b"0:" + json.dumps(word).encode() + b"\n" for word in re.findall(r"\S+\s*", text)], STOP)
    elif streamed:
        head, body = first.head(), chunks(*first.events())
    else:
        head, blank, body = reply(body=first.completion(), chunked=False).partition(b"\r\n\r\n")
        head += blank
    data = head + body
    places = [0, len(head) // 2, len(head), len(head) + len(body) // 2, len(data) - 7] if fault != "cut" else [*range(0, len(data), 7), len(data)]
    timeouts = dict.fromkeys(["idle_timeout", "first_byte_timeout"], 0.05 if fault == "silence" else 20)
    second = FakeOpenAI(text="from b.", models=[model])
    server = pool((first, {"priority": 1, **timeouts}), *([(second, {"priority": 2})] if two else []))
    complete = 0

    def trouble(sock, request):
        sock.sendall(data[:place])
        FAULTS[fault](sock)

    for place in places:
        first.faults = collections.deque([trouble, trouble])     # a kept connection may be tried once more
        end_cooldowns(server)
        got = chat(server, {"model": model, "messages": [user("hi")]}, stream=streamed)
        if got.status != 200:
            assert got.status in (502, 504) and not two, place
            continue
        answer, failed = text_of(got), b'"error"' in got.body
        assert failed or re.search(b'"finish_reason": ?"stop"', got.body), place
        assert streamed and text.startswith(answer) if failed else answer == text or two and answer == "from b.", (place, got.body)
        complete += answer == text and not failed
    assert complete or fault != "cut"
    wait_for(lambda: all(member.in_flight == 0 for member in server.pool.upstreams))


def test_a_thousand_streams_at_once_lose_nothing(pool):
    a = FakeOpenAI(text="one two three four five.")
    gate = threading.Barrier(1001)
    a.faults.extend([a.steps(a.head(), lambda: gate.wait(60), *map(chunk, a.events()), chunks())] * 1000)
    server = pool(a, first_byte_timeout=60, idle_timeout=60)
    request = post("/v1/chat/completions", {**BOTH, "stream": True}, "Connection: close")
    with crowd(server, 1000, request) as socks:
        gate.wait(60)
        complete = b"".join(a.events())
        for sock in socks:
            assert unchunked(receive(sock).partition(b"\r\n\r\n")[2]) == complete
    wait_for(lambda: not server.connections)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here")


def proc_status(process, name):
    """A figure of a process as /proc has it: a count, or KiB."""
    return int(re.search(rf"{name}:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())[1])


def soak(count, log=lambda line: None):
    """Mixed requests, 1 in 20 of them faulted, against a server in a process of its own; its (memory, threads, files) early and late."""
    akash, paid = FakeAkash(), FakeOpenAI(models=["gpt-x", CHAT["model"]])
    akash.requests = paid.requests = collections.deque(maxlen=10)
    faults = [[akash.cut(b'0:"one "\n'), akash.raw(reply(500)), akash.raw(b"\0"), akash.raw(reply(429, b"{}", extra=b"Retry-After: 1\r\n")),
               akash.raw(reply(403, BAD_SESSION))], [paid.cut(), paid.status(500), paid.raw(b"\0"), paid.status(404), paid.early()]]
    config = {"max_wait": 0, "controllers": [{"type": "akash", "base_url": akash.url}, {"base_url": paid.url + "/v1", "api_key": "k"}]}

    def state(process):
        return proc_status(process, "VmRSS"), proc_status(process, "Threads"), len(os.listdir(f"/proc/{process.pid}/fd"))

    def one(server, at):
        if at % 20 == 0:
            which = at // 20 % 2
            (akash, paid)[which].faults.append(faults[which][at // 40 % 5])
        kind = at % 9
        with contextlib.suppress(OSError, http.client.HTTPException):
            if kind == 0:
                ask(server)
            elif kind == 1:
                ask(server, path="/v1/models")
            elif kind == 2:
                chat(server, {"model": CHAT["model"]})
            elif kind == 3:
                talk(server, list(ATTACKS.values())[at % len(ATTACKS)][0], half_close=True)
            elif kind == 4:
                connect(server, post("/v1/chat/completions", {**CHAT, "stream": True})).close()
            elif kind == 5:
                ask(server, "POST", "/v1/embeddings", {"model": "gpt-x"})
            else:
                chat(server, stream=kind % 2 == 0)

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        with started("--config-file", file.name, "--log-level", "error") as (process, server):
            early = None
            with concurrent.futures.ThreadPoolExecutor(8) as threads:
                for begin in range(0, count, 500):
                    list(threads.map(lambda at: one(server, at), range(begin, begin + 500)))
                    if begin + 500 >= count // 3 and early is None:
                        early = state(process)
                    log(f"{begin + 500} requests: {state(process)}")
            wait_for(lambda: ask(server, path="/status").json["controllers"][0]["in_flight"] == 0)
            return early, state(process)


@needs_proc
def test_a_short_soak_leaves_nothing_behind():
    (memory, threads, files), later = soak(3000)
    assert later[0] < memory * 1.1 + 3000 and later[1] <= threads + 12 and later[2] <= files + 40


def in_one_look(server, *happenings):
    """Have the watchdog find all of this at once, in this order."""
    pending, free = threading.Event(), threading.Event()
    server.loop.call_soon_threadsafe(lambda: (pending.set(), free.wait(10)))
    pending.wait(10)
    for happening in happenings:
        happening()
        time.sleep(0.02)    # on its way through the kernel
    free.set()


def test_what_has_left_the_watchdog_is_not_read_by_it(a, pool, caplog):
    server = known(pool(a.faulting(a.stall())))
    with connect(server, post("/v1/chat/completions", {**BOTH, "stream": True})) as sock:
        wait_for(lambda: any(relays(server)))
        in_one_look(server, a.hang_up, lambda: sock.sendall(get()))     # so a thread asks again
        got = receive(sock, lambda got: got.count(b"HTTP/1.1 200 ") == 2 and got.endswith(b"}"))
    assert got.index(b"[DONE]") < got.index(b'"status":"ok"') and len(a.bodies()) == 2
    assert not caplog.records


def test_nothing_is_asked_for_a_client_that_was_found_gone(a, pool, caplog):
    gate = threading.Event()
    server = pool(a.faulting(a.steps(a.begun(1), gate, chunk(a.event({"content": "y"})), 1.0)))
    sock = connect(server, post("/v1/chat/completions", {**BOTH, "stream": True}) * 2)
    sock.recv(10)
    in_one_look(server, gate.set, lambda: reset(sock))
    settle(server)
    assert ask(server).status == 200 and len(a.bodies()) == 1 and not caplog.records


def test_no_ping_follows_the_end_of_a_response(akash, serve):
    server = serve(heartbeat=0.05)
    with connect(server) as sock:
        akash.faults.append(akash.stall(b'0:"x"\n'))
        sock.sendall(post("/v1/chat/completions", {**CHAT, "stream": True}))
        wait_for(lambda: relays(server))
        writer = relays(server)[0].writer
        wait_for(lambda: b": ping" in sock.recv(65536))
        ended = threading.Event()
        server.loop.call_soon_threadsafe(lambda: (writer.finish(), writer.on_idle(time.monotonic() + 1000), ended.set()))
        assert ended.wait(10)
        receive(sock, b"0\r\n\r\n")


def test_an_upstream_that_goes_on_after_the_end_is_left(a, pool, monkeypatch):
    monkeypatch.setattr(akashproxy.EventStream, "DRAIN_TIMEOUT", 0.1)
    server = pool(a.faulting(a.endless(a.begun(None), chunk(b": more\n\n"), 0.02)))
    with connect(server, post("/v1/chat/completions", {**BOTH, "stream": True})):
        wait_for(a.gone.is_set, 3)
    wait_for(lambda: server.pool.upstreams[0].in_flight == 0)


def test_no_more_threads_for_a_client_that_got_pings(a, pool):
    server, done = pool(a.faulting(a.stall()), heartbeat=0.05), threading.Event()
    with connect(server, post("/v1/chat/completions", {**BOTH, "stream": True})) as sock:
        got = sock.recv(65536)
        while server.workers.idle:
            server.submit(done.wait)
        with no_more_threads():
            a.hang_up()
            got += receive(sock)
    done.set()
    assert b": ping" in got and b"Too many clients" not in got
    settle(server)


def test_client_sockets_never_block(serve):
    """Some platforms have no MSG_DONTWAIT: there a blocking socket could stop the loop."""
    server = serve()
    with connect(server, b"GET "):
        wait_for(lambda: server.connections)
        assert all(not connection.sock.getblocking() for connection in server.connections.copy())


# == the bench ================================================================================
# What the server costs, beside the same load sent straight to its upstream: python3 test_akashproxy.py bench

SENT = b"T" * 20    # in a prepared token, the place for the nanosecond at which it is sent
STAMP = re.compile(rb"n(\d{5})t(\d{20})")
PACE = re.compile(rb"(\d+) tokens, (\d+) ms apart")
PATHS = {"Akash": "/api/chat/", "OpenAI": akashproxy.CHAT_PATH}
PAUSE = 50          # milliseconds between two tokens that do not come in a burst
COLUMNS = {"load": 20, "upstream": 8, "by way of": 10, "requests/s": 10, "tokens/s": 8, "first token, ms": 15, "token, ms": 15,
           "CPU s/1k req.": 13, "CPU s/1M tok.": 13, "MB": 4, "lost": 4}


@functools.lru_cache(maxsize=None)
def prepared(path, streamed, count, pause):
    """The parts of an answer that are sent at a time: tokens that have their number, and a place for the clock."""
    tokens = [b"n%05dt%b " % (number, SENT) for number in range(count)]
    if path == PATHS["Akash"]:
        head, parts, end = STREAM_HEAD + chunk(STEP), [b'0:"' + token + b'"\n' for token in tokens], STOP
    elif streamed:
        head, parts = FakeOpenAI.head(), [FakeOpenAI.event({"content": token.decode()}) for token in tokens]
        end = FakeOpenAI.event({}, "stop") + b"data: [DONE]\n\n"
    else:
        return [reply(body=FakeOpenAI.completion(type("Said", (), {"text": b"".join(tokens).decode()})), chunked=False)]
    parts = [head, *map(chunk, parts), chunks(end)]
    return [parts[0] + parts[1], *parts[2:-2], parts[-2] + parts[-1]] if pause else [b"".join(parts)]


class BenchUpstream(asyncio.Protocol):
    """Akash Chat and OpenAI in one loop; an answer is as long and as slow as its question says."""

    def connection_made(self, transport):
        self.transport, self.held, self.loop = transport, b"", asyncio.get_running_loop()

    def data_received(self, data):
        self.held += data
        head, blank, body = self.held.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
        if blank and len(body) >= int(length[1] if length else 0):
            self.held = b""
            self.answer(head.split(b" ")[1].decode(), body)

    def answer(self, path, body):
        asked = PACE.search(body)
        if asked is None:
            return self.transport.write(reply(body=b"{}", extra=b"set-cookie: session_token=x\r\n"))
        count, pause = int(asked[1]), int(asked[2]) / 1000
        self.due = self.loop.time()
        self.send(prepared(path, re.search(rb'"stream": ?true', body) is not None, count, pause), pause)

    def send(self, parts, pause):
        self.transport.write(parts[0].replace(SENT, b"%020d" % time.monotonic_ns()))
        if len(parts) > 1 and not self.transport.is_closing():
            self.due += pause
            self.loop.call_at(self.due, self.send, parts[1:], pause)


def bench_upstream(listener):
    """The process of the upstream; it ends with the one that started it."""
    async def run(): await (await asyncio.get_running_loop().create_server(BenchUpstream, sock=listener, backlog=1024)).serve_forever()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(0)), daemon=True).start()
    asyncio.run(run())


class BenchClient(asyncio.Protocol):
    """One client of a load: it asks until the time is over, and notes of each token when it was sent and when it came."""

    def __init__(self, load):
        self.load, self.over = load, asyncio.get_running_loop().create_future()
        self.begin()

    def begin(self):
        self.began, self.next, self.body, self.held = time.monotonic_ns(), 0, None, b""

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.load.request)

    def data_received(self, data):
        now = time.monotonic_ns()
        if self.body is None:
            head, blank, data = (self.held + data).partition(b"\r\n\r\n")
            if not blank:
                self.held = head
                return
            self.body, self.held = BodyDecoder(akashproxy.parse_head(head, akashproxy.parse_status_line)[1]), b""
        received, at = self.held + self.body.feed(data), 0
        for stamp in STAMP.finditer(received):
            at, number = stamp.end(), int(stamp[1])
            if not number:
                self.load.firsts.append(now - self.began)
            self.load.ways.append(now - int(stamp[2]))
            self.load.lost += abs(number - self.next)
            self.next = number + 1
        self.held = received[max(at, len(received) - 40):]      # the beginning of a token, or the end of the answer
        if self.body.done:
            self.end()

    def end(self):
        self.load.answers += 1
        self.load.lost += abs(self.load.count - self.next) + (not self.held.rstrip().endswith(self.load.ending))
        if time.monotonic() < self.load.until:
            self.begin()
            self.transport.write(self.load.request)
        else:
            self.over.set_result(None)
            self.transport.close()

    def connection_lost(self, error):
        if not self.over.done():
            self.load.lost += max(1, self.load.count - self.next)
            self.over.set_result(None)


class Load:
    """So many clients at a port for some seconds, and what came of it: nanoseconds to first tokens, and of each token's way."""

    def __init__(self, port, path, streamed, count, pause, clients, seconds):
        self.port, self.count, self.clients, self.seconds = port, count, clients, seconds
        self.request = post(path, {"model": "bench", "stream": streamed, "messages": [user(f"{count} tokens, {pause} ms apart")]})
        self.ending = b"[DONE]" if streamed and path == PATHS["OpenAI"] else b"}"
        self.until = time.monotonic() + (0 if pause else seconds)       # of spaced tokens each client has one answer
        self.ramp = seconds / 3 / clients if pause else 0               # seconds between two clients that come
        self.firsts, self.ways, self.answers, self.lost, self.memory = [], [], 0, 0, math.nan

    def run(self, server=None, upstream=None, stopped=()):
        """Run it until its end or a signal is in ``stopped``; the others are ids of processes."""
        began, before, own = time.monotonic(), (usage(server)[0], usage(upstream)[0]), time.process_time()
        asyncio.run(self.all(server, stopped))
        self.elapsed = time.monotonic() - began
        self.cpu = usage(server)[0] - before[0]
        self.busy = (time.process_time() - own) / self.elapsed, (usage(upstream)[0] - before[1]) / self.elapsed
        return self

    async def all(self, server, stopped):
        def look():
            self.memory = usage(server)[1]

        asyncio.get_running_loop().call_later(self.seconds * 0.6, look)
        slow, end = [asyncio.ensure_future(self.one(at)) for at in range(self.clients)], time.monotonic() + self.seconds + 15
        while slow and time.monotonic() < end and not stopped:
            _, slow = await asyncio.wait(slow, timeout=0.2)
        self.lost += len(slow) * self.count

    async def one(self, at):
        await asyncio.sleep(self.ramp * at)
        client = BenchClient(self)
        try:
            await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", self.port)
            await client.over
        except OSError:
            self.lost += self.count

    def cells(self):
        def times(values):
            values = sorted(values) or [math.nan]
            return " / ".join(shown(values[int(len(values) * share)] / 1e6, 2) for share in (0.5, 0.99))

        mark = "*" if max(self.busy) > 0.9 else ""
        return [shown(self.answers / self.elapsed) + mark, shown(len(self.ways) / self.elapsed) + mark, times(self.firsts), times(self.ways),
                shown(self.cpu / max(1, self.answers) * 1e3, 2), shown(self.cpu / max(1, len(self.ways)) * 1e6, 1),
                shown(self.memory), str(self.lost)]


def shown(value, digits=0):
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def usage(pid, proc="/proc"):
    """(seconds of CPU, MB of memory) of a process so far; NaN where neither /proc nor ps tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if pid is not None and os.path.exists(f"{proc}/self/stat"):
            fields = pathlib.Path(f"{proc}/{pid}/stat").read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        if pid is not None:
            columns = subprocess.run(["ps", "-o", "time=,rss=", "-p", str(pid)], stdout=subprocess.PIPE, text=True).stdout.split()
            return sum(float(part) * 60 ** at for at, part in enumerate(reversed(columns[0].split(":")))), int(columns[1]) / 1e3
    return math.nan, math.nan


def most_streams(wanted, resource=resource):
    """As many streams as the limit of open files allows; the server has two for each."""
    if resource is None:    # Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + 100
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= need:
        return wanted
    most = max(1, (soft - 100) // 2)
    print(f"{most} streams instead of {wanted}: a process may have no more than {soft} open files here.")
    return most


def progress(text):
    """What runs now, on stderr: on a terminal one line that changes."""
    if sys.stderr.isatty():
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def bench_processes(stack):
    """Start the upstream, and a server for each kind of it: (the upstream's pid, {(kind, way): (port, path, the server's pid)})."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
    upstream = multiprocessing.Process(target=bench_upstream, args=(listener,), daemon=True)
    upstream.start()
    stack.callback(lambda: (upstream.kill(), upstream.join()))
    folder, ways, port = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())), {}, listener.getsockname()[1]
    for kind, path in PATHS.items():
        options = {"type": kind.lower(), "api_key": "k", "base_url": f"http://127.0.0.1:{port}" + "/v1" * (kind == "OpenAI")}
        (folder / kind).write_text(json.dumps({"controllers": [options]}))
        server, at = stack.enter_context(started("--config-file", str(folder / kind), "--log-level", "error"))
        Load(at, akashproxy.CHAT_PATH, True, 2, 0, 1, 0).run()      # it has a session from now on
        ways[kind, "direct"], ways[kind, "akashproxy"] = (port, path, None), (at, akashproxy.CHAT_PATH, server.pid)
    return upstream.pid, ways


def bench(seconds=3.0, most=1000):
    """Run every load, straight to the upstream and by way of the server, and print a line of the table for each; the exit status."""
    stopped, busy, most = [], [], most_streams(most)
    count = max(2, int(seconds * 2000 / 3 / PAUSE))     # the last stream begins after a third of the time
    loads = [("whole, 16 clients", False, 50, 0, 16), ("bursts, 16 streams", True, 200, 0, 16),
             *((f"spaced, {clients} streams", True, count, PAUSE, clients) for clients in (max(1, most // 10), most))]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    with contextlib.ExitStack() as stack:
        try:
            upstream, ways = bench_processes(stack)
        except AssertionError:
            if not stopped:     # else it was told to stop, too
                raise
        print(*(name.ljust(width) for name, width in COLUMNS.items()), sep=" | ", flush=True)
        print(*("-" * width for width in COLUMNS.values()), sep=" | ")
        for (name, *load), (kind, way) in itertools.product(loads, () if stopped else ways):
            progress(f"{name}, {kind}, {way} ...")
            port, path, server = ways[kind, way]
            done = Load(port, path, *load, seconds).run(server, upstream, stopped)
            progress("")
            if stopped:
                break
            busy.append(done.busy)
            print(*(cell.ljust(width) for cell, width in zip([name, kind, way, *done.cells()], COLUMNS.values())), sep=" | ", flush=True)
    if stopped:
        return 128 + stopped[0]
    print("\nOf a core the load generator took {:.0%} at most, the upstream {:.0%}; where one of them took over 90 % (*), the server "
          "may be capable of more.".format(*map(max, zip(*busy))))
    return 0


# == bounds of sizes and numbers ==============================================================

MOST_VALUES = akashproxy.MAX_JSON_VALUES
PROSE = b"Hello, world: [this] is {prose}, "


@table({
    # name: (text, is it accepted?)
    "prose full of marks": (b'"' + PROSE * 20000 + b'"', True),
    "escaped quotes": (b'["' + rb'\",' * MOST_VALUES + b'"]', True), "escaped backslashes": (b'["' + rb'\\' * MOST_VALUES + b'","' + b"," * MOST_VALUES + b'"]', True),
    "a backslash before a quote": (b'["' + rb'\\\"' * 9 + b"," * MOST_VALUES + b'"]', True),
    "brackets in strings": (b'{"[[[":"' + b"[" * MOST_VALUES + b'","{":"}"}', True),
    "as many as may be": (b"[" + b"0," * (MOST_VALUES - 2) + b"0]", True), "one too many": (b"[" + b"0," * (MOST_VALUES - 1) + b"0]", False),
    "empty objects": (b"[" + b"{}," * MOST_VALUES + b"0]", False), "empty lists": (b"[" + b"[]," * MOST_VALUES + b"0]", False),
    "strings": (b"[" + b'"a",' * MOST_VALUES + b"0]", False), "empty strings": (b"[" + b'"",' * MOST_VALUES + b"0]", False),
    "strings of a comma": (b"[" + b'",",' * MOST_VALUES + b"0]", False), "keys": (b"{" + b'"a":0,' * MOST_VALUES + b'"b":1}', False),
    "blanks between": (b"[" + b"0 , " * MOST_VALUES + b"0]", False), "after an escaped quote": (rb'["\"",' + b"0," * MOST_VALUES + b"0]", False),
    "deep": (b'{"a":[' * 200 + b"0" + b"]}" * 200, True), "too deep": (b'{"a":[' * 251 + b"0" + b"]}" * 251, False),
    "too deep lists": (b"[" * 501 + b" " * 500 + b"]" * 501, False), "too deep behind a string": (b'["]]]]]]",' + b"[" * 501 + b"]" * 502, False),
    "wide but not deep": (b"[" + b'[{"a":[]}],' * 9000 + b"0]", True),
    "a huge integer": (b"9" * 5000, False), "a huge fraction": (b"-1.5e999", False), "a long fraction": (b"0." + b"9" * 5000, True), "NaN": (b"[NaN]", False),
    "a large text that is no UTF-8": (b'"' + b"\x80" * 1_200_000 + b'"', False), "another one": (b'"' + b"\xff" * 1_200_000 + b'"', False),
    "a large text with an open string": ('"\u4e2d'.encode() + b"x" * 1_200_000, False), "one with a break": ('"\u4e2d'.encode() + b"x" * 1_200_000 + b'\n"', False),
})
def test_json_is_bounded_before_it_is_parsed(text, accepted):
    if accepted:
        assert akashproxy.from_json(text) == json.loads(text)
    else:
        with pytest.raises(ValueError):
            akashproxy.from_json(text)


@pytest.mark.parametrize("seed", range(2))
def test_large_json_is_read_and_written_as_small_json_is(seed):
    """Its long strings go a way of their own, in slices: wherever those are cut, nothing changes, and what is no JSON is an error."""
    rng = random.Random(seed)
    atoms = ["a", "Hello ", "\u00e9", "\u4e2d", "\U0001f600", '"', "\\", "\n", "\u2028", "\ud83d", "\ude00", "[", ",", "\x01", '\\"', "u", "_", ":"]
    text = lambda size: "".join(rng.choices(atoms, k=size))
    value = {"a": text(200_000), "b": [text(70_000), 1, None, {"c": text(9), "d": text(300)}, *[text(257) for _ in range(300)]], text(300): text(99_000), "": ""}
    escaped = seed % 2
    data = json.dumps(value, ensure_ascii=bool(escaped)).encode("utf-8", "replace")[:-1] + ',"\u00e9":"'.encode() + b" " * 1_000_000 + b'"}'
    want = json.loads(data.decode())
    assert len(data) > akashproxy.LARGE_JSON and akashproxy.from_json(data) == want and akashproxy.from_json(b"\xef\xbb\xbf" + data) == want
    before = json.dumps(want)
    assert akashproxy.request_json(want, len(data)) == akashproxy.to_json(want) and json.dumps(want) == before
    for _ in range(6):
        at = rng.randrange(600_000)
        malformed = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randrange(2):]
        try:
            value = json.loads(malformed.decode())
        except ValueError:
            with pytest.raises(ValueError):
                akashproxy.from_json(malformed)
        else:
            assert akashproxy.from_json(malformed) == value


def test_embeddings_of_many_token_ids_are_relayed(fake, pool):
    server = pool(fake)
    assert ask(server, "POST", "/v1/embeddings", {"model": "gpt-x", "input": [[12345] * 1000] * 300},
               {"Content-Type": "application/json"}).status == 200
    got = ask(server, "POST", "/v1/embeddings", b'{"model":"gpt-x","input":[' + b"0," * akashproxy.MAX_RELAYED_VALUES + b"0]}",
              {"Content-Type": "application/json"})
    assert got.status == 400 and "1000000 values" in got.json["error"]["message"] and len(fake.bodies()) == 1


SPOKEN = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/messages": "messages", "/v1/responses": "input",
          "/v1/images/generations": "prompt", "/v1/messages/count_tokens": "messages", "/v1/embeddings": "input"}
ODD_JSON = {"infinite": (b"1e999", "1e999"), "infinite below": (b"-1e9999", "-1e9999"), "a long infinite": (b"9" * 400 + b".0", "999..."),
            "NaN": (b"NaN", "NaN"), "a huge integer": (b"7" * 5000, "4300"),
            **{f"{depth} deep": (b"[" * depth + b"]" * depth, "nested too deeply") for depth in (520, 900, 970, 980, 981, 985, 989, 995, 1200, 5000)}}


@pytest.mark.parametrize("kind", [FakeOpenAI, FakeAkash])
def test_odd_json_of_a_client_is_its_mistake(pool, kind):
    fake = kind()
    server = pool(fake)
    for (path, field), (name, (odd, words)), streamed in itertools.product(SPOKEN.items(), ODD_JSON.items(), (b"true", b"false")):
        if path == "/v1/embeddings" and "deep" not in name:
            continue        # it is relayed as it came
        body = b'{"model":"both","stream":%b,"max_tokens":9,"metadata":{"x":%b},"%b":"hi","tools":%b}' % (streamed, odd, field.encode(), odd)
        got = ask(server, "POST", path, body, {"Content-Type": "application/json"})
        assert got.status == 400 and words in got.json["error"]["message"], (path, name, got)
        assert len(got.body) < 500
    assert not fake.bodies()


ODD_COUNTS = [-1, -5, 1 << 53, int("9" * 4200), True, 1.5, "7", None, [], {}]


@pytest.mark.parametrize("path", WANTS)
def test_only_counts_are_taken_as_counts(path, fake, akash, pool):
    servers = [(pool((fake, {"paths": ("/none",)}), metrics="public"), fake), (pool(akash, metrics="public"), akash)]
    for (server, upstream), odd, streamed in itertools.product(servers, ODD_COUNTS, (True, False)):
        usage = {"prompt_tokens": odd, "completion_tokens": odd, "total_tokens": odd, "promptTokens": odd, "completionTokens": odd}
        fine = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": odd, "promptTokens": 5, "completionTokens": 6,
                "prompt_tokens_details": {"cached_tokens": odd}, "completion_tokens_details": {"reasoning_tokens": odd}}
        for reported, known in ((usage, False), (fine, True)):
            if upstream is fake:
                events = [fake.event({"content": "x"}), fake.event({}, "stop"), b"data: " + json.dumps({"choices": [], "usage": reported}).encode() + b"\n\n",
                          b"data: [DONE]\n\n"]
                complete = reply(body={"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": reported})
                answer = fake.head() + chunks(*events) if streamed else complete
            else:
                answer = STREAM_HEAD + chunks(b'0:"x"\nd:' + json.dumps({"finishReason": "stop", "usage": reported}).encode() + b"\n")
            upstream.sends(answer, keep=True)
            got = ask(server, "POST", path, {**ASKED, "input": "hi", "stream": streamed, "stream_options": {"include_usage": True}})
            assert got.status == 200, got
            numbers = [int(number) for number in re.findall(rb'_tokens":(-?\d+)', got.body)]
            assert all(0 <= number < 1 << 53 for number in numbers) and b"error" not in got.body.replace(b'"error":null', b""), (odd, got.body)
            if known and (streamed or path != "/v1/chat/completions"):
                assert {5, 6} <= {*numbers}, (odd, got.body)
    for server, _ in servers:
        counts = re.findall(rb'tokens_total\{[^}]*\} (\S+)', ask(server, path="/metrics").body)
        assert counts and all(float(count).is_integer() and 0 < float(count) < 1 << 53 for count in counts)


def test_a_list_of_models_has_counts_too(fake, pool):
    fake.answer = lambda sock, request: sock.sendall(reply(body={"data": [
        {"id": f"m{at}", "created": odd} for at, odd in enumerate([*ODD_COUNTS, 1700000000])]})) or True
    server = pool(fake)
    assert [model["created"] for model in ask(server, path="/v1/models").json["data"]] == [0] * len(ODD_COUNTS) + [1700000000]
    assert ask(server, path="/v1/models", headers={"anthropic-version": "x"}).status == 200


def test_numbers_that_are_no_json_are_not_passed_on(fake, akash, pool):
    strict = lambda body: json.loads(body, parse_constant=lambda name: pytest.fail(name))
    for arguments in ('{"a":1e999}', '{"a":NaN}', "[" * 700 + "]" * 700, '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000):
        call = {"index": 0, "id": "i", "type": "function", "function": {"name": "f", "arguments": arguments}}
        complete = reply(body={"choices": [{"message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}]})
        got = ask(pool((fake.sends(complete, keep=True), {"paths": ("/none",)})), "POST", "/v1/messages", ASKED)
        assert got.status == 200 and strict(got.body)["content"][0]["input"] == {"arguments": arguments}
    akash.sends(STREAM_HEAD + chunk(
        b'9:{"toolCallId":"c","toolName":"f","args":{"a":1e999,"b":-Infinity,"c":NaN,"d":1.5}}\nd:{"finishReason":"tool-calls","usage":{"promptTokens":1e999}}\n')
        + b"0\r\n\r\n", keep=True)
    got = ask(pool(akash), "POST", "/v1/messages", ASKED)
    assert strict(got.body)["content"][0]["input"] == {"a": None, "b": None, "c": None, "d": 1.5}
    fake.sends(fake.head() + chunks(b'data: {"choices":[{"delta":{"content":"x"},"logprobs":-1e999}]}\n\n'), keep=True)
    got = ask(pool((fake, {"paths": ("/none",)})), "POST", "/v1/messages", {**ASKED, "stream": True})
    assert got.status == 200 and b'"text":"x"' in got.body and b"nfinity" not in got.body


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("odd", ["1e999", "-1e999", "NaN", "-Infinity"])
def test_an_upstreams_number_that_is_not_finite_costs_no_answer(odd, path, pool):
    whole = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop", "logprobs": "ODD"}], "usage": {"prompt_tokens": "ODD"}}
    for padding in ("", "\u4e2d" * (1 << 19)):     # a large text is parsed another way
        fake = FakeOpenAI()
        data = json.dumps({**whole, "padding": padding}, ensure_ascii=False).replace('"ODD"', odd).encode()
        got = ask(pool((fake.sends(reply(200, data)), {"paths": ("/none",)})), "POST", path, {**ASKED, "input": "hi"})
        assert got.status == 200 and "fine" in json.dumps(json.loads(got.body, parse_constant=pytest.fail))


LONG_NAMES = {"letters": "x" * 100_000, "controls": "\x01" * 30_000, "tags": "\U000e0001" * 20_000, "words": "ab -- / " * 10_000}
NAMED = {
    # name: request(long name) -> (method, path, body)
    "a model of a chat": lambda name: ("POST", "/v1/chat/completions", {**BOTH, "model": name}),
    "a model of a stream": lambda name: ("POST", "/v1/chat/completions", {**BOTH, "model": name, "stream": True}),
    "a model of a message": lambda name: ("POST", "/v1/messages", {**ASKED, "model": name}),
    "a model of a response": lambda name: ("POST", "/v1/responses", {"input": "hi", "model": name}),
    "a model of a picture": lambda name: ("POST", "/v1/images/generations", {"prompt": "x", "model": name}),
    "a model of an embedding": lambda name: ("POST", "/v1/embeddings", {"input": "x", "model": name}),
    "a model that is looked up": lambda name: ("GET", "/v1/models/" + akashproxy.urllib.parse.quote(name)[:60000], None),
    "a path": lambda name: ("GET", "/" + akashproxy.urllib.parse.quote(name)[:60000], None),
    "a path that is relayed": lambda name: ("POST", "/v1/" + re.sub("[^a-z]", "x", name)[:60000], {"model": "both"}),
    "a query": lambda name: ("GET", "/v1/none?" + akashproxy.urllib.parse.quote(name)[:60000], None),
    "a picture's name": lambda name: ("GET", "/images/" + akashproxy.urllib.parse.quote(name)[:60000], None),
    "a response's name": lambda name: ("GET", "/v1/responses/" + akashproxy.urllib.parse.quote(name)[:60000], None),
    "a role": lambda name: ("POST", "/v1/chat/completions", {**BOTH, "messages": [{"role": name, "content": "x"}]}),
    "a role in a message": lambda name: ("POST", "/v1/messages", {**ASKED, "messages": [{"role": name, "content": "x"}]}),
    "a type of content": lambda name: ("POST", "/v1/messages", {**ASKED, "messages": [user([{"type": name}])]}),
    "a part of a chat": lambda name: ("POST", "/v1/chat/completions", {**BOTH, "messages": [user([{"type": name}])]}),
    "a field": lambda name: ("POST", "/v1/messages", {**ASKED, name: 1}),
    "a type of tool": lambda name: ("POST", "/v1/messages", {**ASKED, "tools": [{"type": name, "name": name}]}),
    "an item": lambda name: ("POST", "/v1/responses", {"model": "both", "input": [{"type": name}, user("x")]}),
    "a choice of tool": lambda name: ("POST", "/v1/messages", {**ASKED, "tools": [{"name": "f"}], "tool_choice": {"type": name}}),
    "an earlier response": lambda name: ("POST", "/v1/responses", {"model": "both", "input": "x", "previous_response_id": name}),
}


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", LONG_NAMES)
def test_what_is_quoted_is_cut(name, form, akash, pool, caplog):
    caplog.set_level("INFO", "akashproxy")
    servers = [pool(akash), pool(FakeOpenAI(), akash)]
    formatter = akashproxy.LogFormat(form)
    for what, make in NAMED.items():
        method, path, body = make(LONG_NAMES[name])
        for server in servers:
            got = ask(server, method, path, body, {"Content-Type": "application/json"})
            assert len(got.body) + len(str(got.headers)) < 5000, (what, len(got.body))
    for words in ("invalid model name", "x" * 50_000, "\x01" * 50_000):     # and what an upstream says
        akash.sends(reply(500, {"message": words}), keep=True)
        assert len(chat(servers[0]).body) < 5000
    for server in servers:
        assert len(ask(server, path="/status").body) < 10_000
        assert len(ask(server, path="/metrics").body) < 50_000
    wait_for(lambda: sum(hasattr(record, "facts") for record in caplog.records) >= 2 * len(NAMED))
    assert max(len(formatter.format(record).encode()) for record in caplog.records if record.levelname == "INFO") < 5000


def test_a_log_line_costs_by_its_length_at_most():
    formatter = akashproxy.LogFormat("text")

    def cost(message):
        record = akashproxy.logging.makeLogRecord({"msg": message, "levelname": "INFO"})
        before = time.process_time()
        lines = [formatter.format(record) for _ in range(20)]
        return time.process_time() - before, len(lines[0])

    long, size = cost("\x01" * 4000)
    longer, same = cost("\x01" * 4_000_000)
    assert size < 20_000 and same < 20_000 and longer < 5 * long + 0.1
    assert formatter.format(akashproxy.logging.makeLogRecord({"msg": "a\tb\u2028\u00e9\U000e0001\n", "levelname": "INFO"})).endswith(
        "INFO a\\tb\\u2028\u00e9\\U000e0001\\n")


def test_a_list_of_models_is_bounded(pool, caplog):
    names = [f"m{at}" for at in range(11_000)] + ["both"]
    fake, akash = FakeOpenAI(["x" * 257, "m1", 7, "", *names]), FakeAkash()
    server = pool((fake, {"priority": 1}))
    models = [model["id"] for model in ask(server, path="/v1/models").json["data"]]
    assert models == names[1:2] + names[:1] + names[2:10_000] and "lists more than 10000 models" in caplog.text
    akash.models = [{"id": name, "available": True} for name in ["x" * 257, *names]]
    for listing in ([{"id": name, "name": name, "available": True} for name in names], {"models": [{"id": name} for name in names]}):
        assert list(akashproxy.akash_models(listing)) == names[:10_000]
    long = FakeOpenAI([f"a model with a long name {at}" for at in range(60_000)])
    got = ask(pool(long), path="/v1/models")
    assert got.status == 502 and "4194304 bytes" in got.json["error"]["message"]
    assert chat(pool(long), {"model": "any", "messages": [user("hi")]}).status == 200


def test_a_name_with_two_dashes_reads_no_list_anew(own):
    reads, clock = [], Clock()
    own(type("Listed", (akashproxy.Controller,), {"models": lambda self: reads.append(1) or [{"id": "a/b"}]}))
    built = akashproxy.Pool(Settings(controllers=(OF_ONES_OWN,)), clock=clock)
    assert [built.resolve_alias(name) for name in ("a--b", "a--b", "c--d", "a/b")] == [["a/b"], ["a/b"], ["c--d"], ["a/b"]] and len(reads) == 1
    clock.now += 60
    assert built.resolve_alias("a--b") == ["a/b"] and len(reads) == 2


def test_the_estimate_of_tokens_is_that_of_its_parts():
    complete = "The quick brown fox, \u043f\u0440\u0438\u0432\u0435\u0442 \u4e2d\u6587 \U0001f600\u2019 \ud800 " * 9000     # longer than a step
    assert akashproxy.token_units(complete) == sum(map(akashproxy.token_units, complete))
    assert akashproxy.token_units("a" * 8) == akashproxy.token_units("\u0436" * 6) == akashproxy.token_units("\u4e2d\u2e80") == akashproxy.UNITS_PER_TOKEN
    assert akashproxy.estimate_tokens([complete, {"a": complete, "b": [7, None]}]) == (2 * akashproxy.token_units(complete) + 12 - 6) * 2 // 24 + 1


def test_a_response_repeats_no_large_field(streamed, fake, pool):
    server = pool(fake)
    small = {"instructions": "Be brief.", "metadata": {"a": "b"}, "tools": [{"type": "function", "name": "f", "parameters": {}}]}
    large = {"instructions": "x" * 300_000, "metadata": {"a": "x" * 300_000}, "tools": [{**small["tools"][0], "description": "x" * 300_000}]}
    for sent in (small, large):
        got = ask(server, "POST", "/v1/responses", {"model": "both", "input": "hi", "stream": streamed, **sent})
        values = [json.loads(line[6:])["response"] for line in got.body.decode().split("\n") if line.startswith("data: ") and '"response":' in line]
        for value in values if streamed else [got.json]:
            want = sent if sent is small else {"instructions": None, "metadata": {}, "tools": []}
            assert {name: value[name] for name in want} == want
        assert len(got.body) < 20_000
    assert len(json.dumps(fake.bodies()[-1])) > 600_000      # the upstream gets it all


def prompt_of(content):
    return b'{"model":"both","stream":true,"max_tokens":9,"messages":[{"role":"user","content":%b}]}' % content


LARGE = 4 << 20


@needs_proc
@table({
    # name: (path, body)
    "prose": ("/v1/chat/completions", lambda: prompt_of(b'"' + PROSE * (LARGE // 34) + b'"')),
    "prose for messages": ("/v1/messages", lambda: prompt_of(b'"' + PROSE * (LARGE // 34) + b'"')),
    "objects": ("/v1/chat/completions", lambda: b"[" + b"{}," * (LARGE // 3) + b"{}]"),
    "lists": ("/v1/messages", lambda: b"[" + b"[]," * (LARGE // 3) + b"[]]"),
    "keys": ("/v1/responses", lambda: b"{" + b",".join(b'"%d":0' % at for at in range(LARGE // 10)) + b"}"),
    "strings as content": ("/v1/messages", lambda: prompt_of(b"[" + b'"a",' * (LARGE // 4) + b'"a"]')),
    "empty texts as content": ("/v1/messages", lambda: prompt_of(b"[" + b'{"type":"text","text":""},' * (LARGE // 26) + b'"a"]')),
    "prose and an emoji": ("/v1/chat/completions", lambda: prompt_of(b'"' + "\U0001f600".encode() + PROSE * (LARGE // 34) + b'"')),
    "prose and emoji for messages": ("/v1/messages", lambda: prompt_of(b'"' + (PROSE * 9 + "\U0001f600".encode()) * (3 * LARGE // 320) + b'"')),
    "Chinese": ("/v1/messages", lambda: prompt_of(b'"' + "\u4e2d\u6587".encode() * (LARGE // 6) + b'"')),
    "Chinese and ASCII, counted": ("/v1/messages/count_tokens", lambda: prompt_of(b'"' + "\u4e2da".encode() * (LARGE // 4) + b'"')),
    "escaped Chinese": ("/v1/messages", lambda: prompt_of(b'"' + rb"\u4e2d" * (LARGE // 6) + b'"')),
    "zeros, counted": ("/v1/messages/count_tokens", lambda: b'{"model":"both","messages":[' + b"0," * (LARGE // 2) + b"0]}"),
    "instructions": ("/v1/responses", lambda: b'{"model":"both","input":"hi","stream":true,"instructions":"' + PROSE * (LARGE // 34) + b'"}'),
    "tools": ("/v1/responses", lambda: b'{"model":"both","input":"hi","stream":true,"tools":[{"type":"function","name":"f","description":"'
              + PROSE * (LARGE // 34) + b'"}]}'),
    "a model's name": ("/v1/chat/completions", lambda: b'{"messages":[{"role":"user","content":"x"}],"model":"' + b"m" * LARGE + b'"}'),
    "a limited key, quotes in arguments": ("/v1/messages?limited", lambda: prompt_of(b'"hi"},{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"f","input":{"a":"'
                                           + rb'\"\\' * (LARGE // 4) + b'"}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":"r"}]')),
    "a limited key, an emoji": ("/v1/messages?limited", lambda: prompt_of(b'"' + rb"\ud83d\ude00" + PROSE * (LARGE // 34) + b'"')),
})
def test_a_request_takes_at_most_eight_times_its_size(path, make, tmp_path, fake):
    body = make()
    config = tmp_path / "akashproxy.json"
    limited = {"bearer_token": "any-key", "keys": [{"name": "dear", "key": "dear-key", "models": ["both"]}]} if path.endswith("?limited") else {}
    config.write_text(json.dumps({"controllers": [{"base_url": fake.url + "/v1", "api_key": "k"}], **limited}))

    with started("--config-file", str(config), "--log-level", "error") as (process, server):
        assert ask(server, "POST", "/v1/messages", ASKED, bearer("dear")).status == 200     # what a first request loads
        before, slowest = proc_status(process, "VmRSS"), 0.0
        asked = later(ask, server, "POST", path, body, {"Content-Type": "application/json", **bearer("dear")})
        while not asked.done():
            start_time = time.monotonic()
            assert ask(server).status == 200
            slowest = max(slowest, time.monotonic() - start_time)
        got, taken = asked.result(), (proc_status(process, "VmHWM") - before) << 10
    assert got.status in (200, 400, 404) and len(got.body) < 20_000
    assert taken < 8 * len(body) and slowest < 2, (taken / len(body), slowest)      # seconds: the machine may be busy


# == fuzzing, and the bugs of controllers =====================================================


def fuzzed(examples):
    """Run a test with sources of chance: hypothesis' where it is installed, which then finds the smallest case."""
    def decorate(test):
        def run():
            try:
                import hypothesis.strategies    # here, for it takes long
            except ImportError:
                for seed in range(examples * FUZZ):
                    test(random.Random(seed))
                return
            given = hypothesis.given(hypothesis.strategies.randoms(use_true_random=False))
            hypothesis.settings(max_examples=examples * FUZZ, deadline=None, database=None, derandomize=FUZZ == 1,
                                suppress_health_check=list(hypothesis.HealthCheck))(given(test))()
        return run
    return decorate


ODD_VALUES = [None, True, False, 0, -1, 1.5, 10 ** 30, "", "x", "stop", "error", "\ud83d", [], ["stop"], {}, {"a": [1]}, [[]], [{}], {"type": []}]


def odd(rng, value, chance=0.25):
    if rng.random() < chance / 2:
        return rng.choice(ODD_VALUES)
    if isinstance(value, dict):
        return {name: odd(rng, part, chance) for name, part in value.items() if rng.random() > chance / 4}
    return [odd(rng, part, chance) for part in value] if isinstance(value, list) else value


CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USED = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
AKASH_PARTS = {"f": {"messageId": "m"}, "0": "Hel", "g": "hm", "9": {"toolCallId": "c", "toolName": "f", "args": {}}, "3": "terminated",
               "e": {"finishReason": "stop"}, "d": {"finishReason": "stop", "usage": {"promptTokens": 1, "completionTokens": 2}}}
AKASH_EVENTS = [{"type": "start"}, {"type": "text-delta", "delta": "Hi"}, {"type": "reasoning-delta", "delta": "hm"},
                {"type": "tool-input-available", "toolCallId": "c", "toolName": "f", "input": {}}, {"type": "error", "errorText": "x"},
                {"type": "finish", "finishReason": "stop", "messageMetadata": {"usage": {"inputTokens": 1, "outputTokens": 2}}}]
CHAT_CHUNKS = [{"choices": [{"index": 0, "delta": assistant(""), "finish_reason": None}]},
          {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
          {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}, {"choices": [{"index": 0, "delta": {"tool_calls": [CALL]}}]},
          {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USED},
          {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}]
COMPLETION = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi", "reasoning_content": "hm", "tool_calls": [CALL]},
                           "finish_reason": "stop"}], "usage": USED}
ERROR = {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}, "message": "m", "resetTime": "2030-01-01T00:00:00Z"}


def odd_lines(rng, kind):
    """A stream of some kind, with odd values in it."""
    def line():
        if kind == "akash v4":
            code = rng.choice(list(AKASH_PARTS))
            return f"{code}:{json.dumps(odd(rng, AKASH_PARTS[code]))}\n"
        if kind == "akash v5":
            return f"data: {json.dumps(odd(rng, rng.choice(AKASH_EVENTS)))}\n\n"
        return f"data: {json.dumps(odd(rng, rng.choice(CHAT_CHUNKS)))}\n\n"

    return "".join(line() for _ in range(rng.randint(1, 6))).encode() + rng.choice([b"", b"data: [DONE]\n\n"])


DECODERS = {"akash v4": lambda: akashproxy.DecoderChain(AkashDecoder("m"), akashproxy.SurrogateFilter(), ThinkTagFilter()), "chat": lambda: akashproxy.DecoderChain(akashproxy.ChatDecoder(), akashproxy.SurrogateFilter()),
            "akash v5": lambda: akashproxy.DecoderChain(AkashDecoder("m"), akashproxy.SurrogateFilter(), ThinkTagFilter()),
            "relay": lambda: akashproxy.PassthroughDecoder("a", end=akashproxy.STREAM_ENDS["/v1/chat/completions"])}


@fuzzed(150)
def test_odd_values_of_a_stream_are_events_or_an_error(rng):
    kind = rng.choice(list(DECODERS))
    events, error = decoded(DECODERS[kind](), [odd_lines(rng, kind)])
    assert all(isinstance(event, akashproxy.EVENTS) for event in events) and (error is None or 400 <= error[0] < 600)
    for dialect in ([akashproxy.ChatCompletions(CHAT)] if kind == "relay" else
                    [akashproxy.ChatCompletions(CHAT), akashproxy.Messages(ASKED), akashproxy.Responses(WANTED)]):
        frames = (dialect.opening_frames() + dialect.encode(events)).decode()
        for text in re.findall("^data: (.*)$", frames, re.M):
            assert kind == "relay" or text == "[DONE]" or isinstance(json.loads(text), dict)


SCRAPS = {
    "akash v4": [b'0:"a"\n', b'0:"\xed\xa0\xbd"\n', b'0:"\xed\xb8\x80b"\n', b'0:"\\ud83d"\n', b'0:"\\ude00"\r\n', b'g:"h"\n', b'0:"<think>\\n"\n',
                 b'0:"<think>\\nx\\n</think>\\n\\n"\n', b'0:"\\u003cthink>\\ny\\n</think>\\n\\n"\n', b"\n", b"\r\n", b": x\n", b'0:"a\n', b'0:b"\n',
                 b"0:\n", b'0:["a"\n', b'0:"b"]\n', b'0:"c","d"\n', b'0:"\xff"\n', b'0:"e"x\n', b"0:7\n", b'0:"\xf0\x9f\x98\x80\xea\xb0\x80\xed\x95\x9c"\n', b'f:{}\n',
                 b'3:"x"\n', b'd:{"finishReason":"stop"}\n', b'd:{"finishReason":"stop"}', b'0:"z"'],
    "akash v5": [b'data: {"type":"text-delta","delta":"a"}\n\n', b'data: {"type":"text-delta","delta":"\xed\xa0\xbd"}\r\n\r\n', b": x\n\n", b"event: y\n",
                 b'data: {"type":"text-delta","delta":"\xed\xb8\x80"}\n\n', b'data: {"type":"finish"}\n\n', b"data: [DONE]\n\n", b"data: {\n\n",
                 b'data:{"type":"reasoning-delta","delta":"<think>"}\n\n', b'data: {"type":"text-delta","delta":"<think>q</think>"}\n\n'],
    "chat": [b": x\n\n", b"\n", b"\r\n", b"id: 1\n", b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n', b"data: [DONE]\n\n",
             b'data: {"choices":[{"delta":{"content":"\xed\xa0\xbd"}}]}\r\n\r\n', b'data: {"choices":\ndata: [{"delta":{"content":"b"}}]}\n\n',
             b'data: {"choices":[{"delta":{"content":"[DONE]"},"finish_reason":null}]}\n\n', b"data: [DONE]\r\n\r\n", b"data: [DONE]\n",
             b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n', b'data: {"error":{"message":"no"}}\n\n', b"data: x\n\n", b"data: [DONE]",
             b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n', b"x: [DONE]\n"],
}
SCRAPS["relay"] = SCRAPS["chat"]


def stream_read(kind):
    """What a decoder makes of a stream in parts: an answer, or the bytes that are relayed, and an error."""
    def read(parts):
        events, error = decoded(DECODERS[kind](), parts)
        assert not any(isinstance(event, Text) and re.search("[\ud800-\udfff]", event.text) for event in events)
        return b"".join(event.data for event in events) if kind == "relay" else fold(events), error
    return read


TEXTS = ["a", "b", " ", "\n", "##", "#", "<think>", "</think>", "<th", "<think>\n"]


@table({    # (scraps, how many of them at most, what comes of such data in parts)
    **{kind: (scraps, 8, stream_read(kind)) for kind, scraps in SCRAPS.items()},
    "thinking": (TEXTS, 12, lambda parts: fold(filtered(ThinkTagFilter(), parts))),
    "stops": (TEXTS, 12, lambda parts: fold(filtered(StopFilter(["##b"], None), parts))),
    "tool calls": (["a ", "\n", "`", "<tool_call>", "</tool_call>", "<tool", '{"name": "now", "arguments": {}}', "{'name': 'now',}", "<function=",
                    "now", ">", "[TOOL_CALLS]", "<parameter=a>1</parameter>", "</function>", "}", "functions.", ":0", "<｜tool▁sep｜>"], 9,
                   lambda parts: tool_answer(parts)),
    "framing": ([b"1\r\na\r\n", b"02\r\n\r\n\r\n", b"3;ext=1\r\n0\r\n\r\n", b"A\r\n0123456789\r\n", b"0\r\n\r\n",
                 b"00\r\nx: y\r\n\r\n", b"zz\r\n", b"next"], 6, lambda parts: read_request([POST + CHUNKS + b"\r\n", *parts])),
})
def test_where_it_is_cut_changes_nothing(scraps, most, read):
    @fuzzed(100)
    def check(rng):
        data = scraps[0][:0].join(rng.choice(scraps) for _ in range(rng.randint(1, most)))
        patterns = (r"[^\n]*\n|[^\n]+", r"(?s).+?(?:\n\r?\n|\Z)")      # lines, and events
        at = sorted({0, *(rng.randint(0, len(data) - 1) for _ in range(rng.randint(1, 6)))})
        cut_up = [data[start:end] for start, end in zip(at, [*at[1:], len(data)])]
        complete = read([data])
        for parts in (split(data, 1), cut_up, *(re.findall(each if isinstance(data, str) else each.encode(), data) for each in patterns)):
            assert read(parts) == complete, data

    check()


@pytest.mark.parametrize("path", WANTS)
def test_whatever_an_upstream_sends_the_client_gets_an_answer_or_an_error(path, streamed, akash, pool):
    rng, upstream = random.Random(f"{path} {streamed}"), FakeOpenAI()
    fields = [b"Retry-After: Mon, 01 Jan 2024 00:00:00 +99999999999999999999\r\n", b"x-ratelimit-reset: 1.51.5\r\n", b"Retry-After: -1\r\n", b"",
              b"x-ratelimit-reset-tokens: 1e9s\r\n", b"Retry-After: \xb2\r\n", b"Content-Type: application/json\r\n", b"Keep-Alive: timeout=x\r\n"]

    def fault(kinds, completion):
        def send(sock, request):
            status, extra = rng.choice([200, 200, 200, 400, 403, 429, 500]), rng.choice(fields)
            if status == 200 and (rng.random() < 0.7 or completion is None):
                kind = "text/event-stream" if completion else "text/plain"
                sock.sendall(reply(body=odd_lines(rng, rng.choice(kinds)), kind=kind, extra=extra))
            else:
                sock.sendall(reply(status, odd(rng, completion if status == 200 else ERROR), extra=extra))
            return True
        return send

    server = pool(upstream, akash)
    for _ in range(40 * FUZZ):
        end_cooldowns(server)
        upstream.faults = collections.deque([fault(["chat"], COMPLETION)] * 2)
        akash.faults = collections.deque([fault(["akash v4", "akash v5"], None)] * 2)
        got = ask(server, "POST", path, {**WANTS[path], "stream": streamed})
        if got.headers["content-type"].startswith("text/event-stream"):
            frames = re.findall(rb"^data: (.*)$", got.body, re.M)
            assert frames
            for frame in frames:
                frame == b"[DONE]" or json.loads(frame)
        else:
            assert got.status == 200 and got.body or got.json["error"]["message"], got.body


def test_a_controller_may_go_through_the_events_of_another_one(pool, own):
    class Loud(akashproxy.OpenAIController):
        def events(self, call):
            for event in super().events(call):
                yield Text(event.text.upper()) if isinstance(event, Text) else event

    own(Loud)
    a, before = FakeOpenAI(text="one two"), akashproxy.CancelScope.active.copy()
    server = pool((a, {"type": "own", "paths": ("/none",), "api_key": "k"}))
    for streamed in range(2):
        assert (stream(server, BOTH)[0] if streamed else text_of(chat(server, BOTH))) == "ONE TWO"
    a.faults += [a.refuse(), a.early(), a.status(500)]      # the first is a kept connection's end, and asked again
    assert statuses(server, 2) == [502, 502] and not a.faults
    wait_for(lambda: not akashproxy.CancelScope.active - before)


def test_a_controller_of_ones_own_may_stream_raw_bytes(serve, own):
    own(type("Own", (akashproxy.Controller,), {"events": lambda self, call: map(akashproxy.RawBytes, [b"data: {}\n\n", b"data: [DONE]\n\n"])}))
    assert chat(serve(controllers=(OF_ONES_OWN,)), stream=True).body.endswith(b"\n\ndata: {}\n\ndata: [DONE]\n\n")


class Broken(akashproxy.Controller):
    """A controller with a bug in one place: before its answer, within it, or where it says what it can do."""

    place = ""

    def raise_in(self, place):
        if place == self.place:
            raise {"os": ConnectionRefusedError}.get(self.options.api_key, KeyError)("a bug")

    def events(self, call):
        self.raise_in("events")
        return self.answer()

    def answer(self):
        self.raise_in("first")
        yield Text("half")
        self.raise_in("second")
        if self.place == "odd":
            yield "not an event"
        yield Finish("stop")

    def check_support(self, call):
        self.raise_in("able")

    def models(self):
        self.raise_in("models")
        return [{"id": "both"}, {}] if self.place == "list" else [{"id": "both"}]

    def image(self, name, watch):
        self.raise_in("image")
        return super().image(name, watch)

    def on_tick(self, now):
        self.raise_in("tick")


@pytest.mark.parametrize("kind", ["own", "os"])
@pytest.mark.parametrize("place", ["events", "first", "second", "odd", "able"])
def test_a_bug_of_a_controller_is_that_controllers_failure(place, streamed, kind, pool, own, caplog):
    own(type("Own", (Broken,), {"place": place}))
    name = f"own-{place}-{streamed}-{kind}"
    server = pool((FakeOpenAI(), {"type": "own", "name": name, "api_key": kind}), (FakeOpenAI(), {"priority": 2}))
    for tracebacks in ([True], [True, False]):
        got = chat(server, BOTH, stream=streamed)
        if streamed and place in ("second", "odd"):
            text, _, _, error = read_chunks(sse(got.body))
            assert text == "half" and error["code"] == "upstream_error"
        else:
            assert got.status == 200 and b"there." in got.body and route_of(got).endswith("b=200")
        wait_for(lambda: ask(server, path="/status").json["controllers"][0]["failed"] == len(tracebacks))
        reports = [record for record in caplog.records if record.getMessage().startswith(name + ": unexpected error")]
        assert [bool(record.exc_info) for record in reports] == tracebacks
        assert ask(server, path="/status").json["controllers"][0]["rests_for_seconds"] > 0
        end_cooldowns(server)


def test_a_bug_on_a_tick_delays_no_queued_call(fake, pool, own):
    own(type("Own", (Broken,), {"place": "tick"}))
    server = pool((fake.faulting(fake.stall()), {"type": "own", "priority": 2, "models": ("none",)}), (fake, {"max_concurrency": 1}), max_wait=0.1)
    with connect(server, post("/v1/chat/completions", BOTH)):
        wait_for(lambda: len(fake.bodies()) == 1)
        got = chat(server, BOTH)
        assert got.status == 429 and "busy" in got.json["error"]["message"]


@pytest.mark.parametrize("place", ["models", "list", "image"])
def test_a_bug_in_a_list_or_a_picture_harms_no_other_controller(place, pool, own):
    own(type("Own", (Broken,), {"place": place}))
    server = pool((FakeOpenAI(), {"type": "own", "api_key": "own"}), FakeAkash())
    assert "Qwen/Qwen3" in {model["id"] for model in ask(server, path="/v1/models").json["data"]}
    assert ask(server, path="/images/job_51083a4c_00001_.png").body == PNG


class OwnHTTP(akashproxy.Controller):
    """A controller for an HTTP API; decoder(head) reads an answer."""

    def __init__(self, options, settings):
        super().__init__(options, settings)
        self.transport = akashproxy.Transport(options, settings, options.base_url, self.name, {})

    def events(self, call):
        return akashproxy.EventStream(self.transport.start_request("POST", "/", call.scope, b"{}"), self.decoder)


@pytest.mark.parametrize("when", ["head", "first", "later", "end"])
def test_a_bug_of_a_decoder_is_that_controllers_failure(when, streamed, a, b, pool, own, caplog):
    fed = threading.Event()

    class Buggy(AkashDecoder):
        def feed(self, data):
            if when == "first" or when == "later" and fed.is_set():
                raise IndexError("a bug")
            fed.set()
            return super().feed(data)

        def close(self):
            return {}["a bug"] if when == "end" else super().close()

    own(type("Own", (OwnHTTP,), {"decoder": lambda self, head: 1 / 0 if when == "head" else Buggy()}))
    a.faults.append(a.steps(STREAM_HEAD + chunk(b'0:"half"\n'), *[fed] * (when == "later"), (chunk(STOP) if when != "end" else b"") + b"0\r\n\r\n"))
    name = f"own-{when}-{streamed}"
    server = pool((a, {"type": "own", "name": name, "models": ("both",)}), (b, {"priority": 2}))
    got = chat(server, BOTH, stream=streamed)
    wait_for(lambda: ask(server, path="/status").json["controllers"][0]["failed"] >= 1)
    if streamed and when in ("later", "end"):
        assert read_chunks(sse(got.body))[3]["code"] == "upstream_error"
    else:
        assert got.status == 200 and route_of(got) == f"{name}=502, b=200"
    reports = [record for record in caplog.records if "unexpected error" in record.getMessage()]
    assert [bool(record.exc_info) for record in reports] == [True]


ROLE = FakeOpenAI.event(assistant(""))
OPENINGS = {    # what comes before any content
    "Akash's first line": ("akash", "/v1/chat/completions", STEP),
    "a role": ("openai", "/v1/chat/completions", ROLE),
    "a role without content": ("openai", "/v1/chat/completions", FakeOpenAI.event(assistant(None))),
    "comments": ("openai", "/v1/chat/completions", b": processing\n\n: processing\n\n"),
    "comments after a role": ("openai", "/v1/chat/completions", ROLE + b": processing\n\n"),
    "no choice yet": ("openai", "/v1/chat/completions", b'data: {"choices":[],"prompt_filter_results":[]}\n\n'),
    "pings": ("openai", "/v1/chat/completions", b'event: ping\ndata: {}\n\ndata: null\n\ndata: {"type":"keep-alive"}\n\n'),
    "a role that is translated": ("openai", "/v1/messages", ROLE + b": x\n\n"),
    "a message's start": ("anthropic", "/v1/messages", b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
                          b'event: ping\ndata: {"type":"ping"}\n\ndata: {"type":"content_block_start","index":0}\n\n'),
    "a response's start": ("anthropic", "/v1/responses", b'data: {"type":"response.created"}\n\ndata: {"type":"response.output_item.added"}\n\n'),
}
BEGUN = {       # content
    "Akash's text": ("akash", "/v1/chat/completions", STEP + b'0:"a"\n'), "Akash's thought": ("akash", "/v1/chat/completions", b'g:"a"\n'),
    "text": ("openai", "/v1/chat/completions", FakeOpenAI.event(assistant("a"))),
    "a thought": ("openai", "/v1/chat/completions", FakeOpenAI.event({"content": None, "reasoning_content": "a"})),
    "a call": ("openai", "/v1/chat/completions", FakeOpenAI.event({"role": "assistant", "content": None, "tool_calls": [CALL]})),
    "sound": ("openai", "/v1/chat/completions", FakeOpenAI.event({"audio": {"data": "AA"}})),
    "translated": ("openai", "/v1/responses", ROLE + FakeOpenAI.event({"content": "a"})),
    "a message's text": ("anthropic", "/v1/messages", b'data: {"type":"content_block_delta","delta":{"text":"a"}}\n\n'),
}


@pytest.mark.parametrize("by_thread", [False, True], ids=["", "by a thread"])
@table({**{name: (*row, False) for name, row in OPENINGS.items()}, **{name: (*row, True) for name, row in BEGUN.items()}})
def test_the_first_byte_limit_rules_until_the_first_content_and_the_idle_limit_after_it(kind, path, opening, begun, by_thread, pool, own):
    fake = FakeAkash() if kind == "akash" else FakeOpenAI()
    fake.faults.append(Fake.stall(fake, (STREAM_HEAD if kind == "akash" else fake.head()) + chunk(opening)))
    options = {"first_byte_timeout": 20, "idle_timeout": 0.05} if begun else {"first_byte_timeout": 0.12, "idle_timeout": 0.05}
    if by_thread:   # as a controller of one's own that passes the events of another one on
        base = akashproxy.CONTROLLERS["akash" if kind == "akash" else "openai"]
        own(type("Threaded", (base,), {"events": lambda self, call: iter(base.events(self, call))}))
        options.update(type="own", base_url=fake.url)
    if kind == "anthropic":
        options["paths"] = (path,)
    got = ask(pool((fake, options)), "POST", path, {**WANTS[path], "stream": True}).body
    assert (b"sent nothing for 0.05 seconds" in got) == begun and (b"did not answer within 0.12 seconds" in got) == (not begun)
    wait_for(fake.gone.is_set)      # it is left


def test_comments_do_not_put_the_first_byte_limit_off(a, b, pool):
    server = pool((a.faulting(a.endless(a.head(), chunk(b": processing\n\n"), 0.05)), {"first_byte_timeout": 0.2}), (b, {"priority": 2}))
    assert route_of(chat(server, BOTH, stream=True)) == "a=504, b=200"


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n", b"HTTP/1.1 200 OK\r\n"])
@table({
    "half": (b'{"data":[{"embedding":[1,2', 502), "ends in a bracket": (b'{"data":[{"embedding":[1,2]}', 502), "nothing": (b"", 502),
    "an error": (b'{"error":{"message":"no","type":"x"}}', 502), "whole": (b'{"data":[{"embedding":[1,2]}]}\n', 200), "a list": (b"[1]", 502),
})
def test_json_to_the_end_of_the_connection_is_looked_at(body, status, head, a, b, pool):
    a.sends(head + b"Content-Type: application/json\r\n\r\n" + body)
    got = ask(pool((a, {"priority": 1}), (b, {"priority": 2})), "POST", "/v1/embeddings", {"model": "both", "input": "x"})
    assert got.status == 200 and route_of(got) == ("a=200" if status == 200 else "a=502, b=200")
    assert (got.body == body) == (status == 200)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("framed", ["length", "chunked", "close"])
@pytest.mark.parametrize("kind", ["application/octet-stream", "text/event-stream", "application/json"])
def test_a_tls_upstream_that_is_cut_is_not_whole(kind, framed, clean, pool, tmp_path):
    fake, body = TLSOpenAI(tmp_path), {"text/event-stream": b'data: {"a":1}\n\n', "application/json": b'{"a":1}'}.get(kind, b"some bytes")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n" % kind.encode()

    def fault(sock, request):
        sock.sendall(head + {"length": b"Content-Length: %d\r\n\r\n%b" % (len(body), body), "close": b"\r\n" + body,
                             "chunked": b"Transfer-Encoding: chunked\r\n\r\n" + chunks(body)}[framed])
        with contextlib.suppress(OSError):
            sock.unwrap() if clean else socket.socket.shutdown(sock, socket.SHUT_WR)

    server = pool(fake.faulting(fault), ca_file=fake.ca_file)
    request = post("/v1/other", {"model": "both", "stream": kind == "text/event-stream"}, "Connection: close")
    got = talk(server, request)
    complete = framed != "close" or clean
    assert (b" 200 OK" in got and body in got and (got.endswith(b"0\r\n\r\n") or got.endswith(body)) and b"broke off" not in got) == complete, got


def test_odd_reasons_to_end_are_unknown_ones():
    for reason in ODD_VALUES:
        for data in (f"d:{json.dumps({'finishReason': reason})}\n", f"data: {json.dumps({'type': 'finish', 'finishReason': reason})}\n\n"):
            events, error = decoded(DECODERS["akash v4"](), [data.encode()])
            assert (events == [Finish("stop")]) == (reason == "stop") and (error is None) == (reason == "stop")


# == metrics, usage and the log ===============================================================


def test_metrics_of_each_way_a_request_can_end(akash, serve):
    server = serve()
    akash.faults.extend([akash.raw(reply(400, b'{"error":"x"}')), akash.cut(b'0:"one "\n')])
    assert chat(server).status == 502
    assert stream(server)[3], "broken off"
    assert stream(server)[0] == "Hello from the mock."
    chat(server)
    chat(server, model="")
    for path in ("/health", "/v1/models", "/v1/models/Qwen/Qwen3", "/images/x.png", "/a", "/b?c=/health", "/v1/models/{}", "/{}"):
        ask(server, path=path)
    ask(server, "POST", "/v1/embeddings", {"model": "x"})
    ask(server, "OPTIONS", "/v1/completions")
    talk(server, b"nonsense\r\n\r\n")
    akash.faults.append(akash.stall(None))
    with connect(server, post("/v1/chat/completions", CHAT)):
        wait_for(lambda: samples(server)["akashproxy_requests_in_flight",] == 1)
    expected = {("/v1/chat/completions", "200", "akash"): 3, ("/v1/chat/completions", "502", ""): 1, ("/v1/chat/completions", "400", ""): 1, ("/v1/chat/completions", "499", ""): 1,
                ("/health", "200", ""): 1, ("/v1/models", "200", ""): 1, ("/v1/models/{}", "200", ""): 1, ("/v1/models/{}", "404", ""): 1,
                ("/images/{}", "404", ""): 1, ("other", "404", ""): 3, ("relayed", "404", ""): 1, ("/v1/completions", "204", ""): 1,
                ("other", "400", ""): 1}

    requests = lambda: {key[1:]: value for key, value in samples(server).items() if key[0] == "akashproxy_requests_total" and key[1] != "/metrics"}
    wait_for(lambda: sum(requests().values()) == sum(expected.values()))    # some are counted just after their answer
    assert requests() == expected
    found = samples(server)
    assert found["akashproxy_time_to_first_token_seconds_count", "akash"] == 2, "streams only"
    assert found["akashproxy_request_duration_seconds_count", "akash"] == 3
    assert found["akashproxy_requests_in_flight",] == 0 and found["akashproxy_session_renewals_total", "akash"] == 1
    assert found["akashproxy_open_connections",] >= 1 and found["akashproxy_sent_bytes_total",] > 1000
    assert abs(found["process_start_time_seconds",] - time.time()) < 60 and found["process_cpu_seconds_total",] > 0
    assert found["akashproxy_build_info", akashproxy.__version__, "%d.%d.%d" % sys.version_info[:3]] == 1


def test_metrics_of_failovers_rests_and_tokens(a, pool, akash):
    a.faults.extend([a.status(429, extra=b"Retry-After: 99\r\n")])
    akash.chat = HELLO.replace(b'"promptTokens":null,"completionTokens":null', b'"promptTokens":11,"completionTokens":5')
    server = pool(a, (akash, {"priority": 2}))
    for streamed in (False, True):
        assert route_of(chat(server, CHAT, stream=streamed)).endswith("b=200")
    wait_for(lambda: samples(server)["akashproxy_request_duration_seconds_count", "b"] == 2)
    found = samples(server)
    assert (found["akashproxy_failovers_total",], found["akashproxy_controller_rests_total", "a"]) == (1, 1)
    assert (found["akashproxy_controller_resting", "a"], found["akashproxy_controller_resting", "b"]) == (1, 0)
    assert (found["akashproxy_prompt_tokens_total", "b"], found["akashproxy_completion_tokens_total", "b"]) == (22, 10)
    before = server.pool.upstreams[0]
    server.reload(dataclasses.replace(server.settings, max_wait=1))
    assert server.pool.upstreams[0] is not before and samples(server)["akashproxy_controller_rests_total", "a"] == 1


def usages(got):
    """All usages in an answer, streamed or not."""
    documents = [got.json] if got.json else [json.loads(line[6:]) for line in got.body.decode().split("\n") if line.startswith("data: {")]
    inner = [part for document in documents for part in (document, document.get("response"), document.get("message")) if part]
    return [part["usage"] for part in inner if part.get("usage")]


@table({   # (path, body, how the counts are called there, where the usage stands)
    "a chat": ("/v1/chat/completions", {"messages": [user("x" * 400)]}, ("prompt_tokens", "completion_tokens")),
    "a completion": ("/v1/completions", {"prompt": "x" * 400}, ("prompt_tokens", "completion_tokens")),
    "Messages": ("/v1/messages", {"messages": [user("x" * 400)], "max_tokens": 99}, ("input_tokens", "output_tokens")),
    "Responses": ("/v1/responses", {"input": "x" * 400}, ("input_tokens", "output_tokens")),
})
@pytest.mark.parametrize("told", [False, True])
def test_usage_is_always_there(path, body, names, streamed, told, akash, serve, log):
    end = END.replace(b"%b", b"stop")
    akash.chat = (STEP + b"".join(b'0:"%b "\n' % (b"word" * 5) for _ in range(20))
                  + (end.replace(b'"promptTokens":null,"completionTokens":null', b'"promptTokens":11,"completionTokens":7') if told else end))
    server = serve(keys=keys("alice"))
    got = ask(server, "POST", path, {"model": "Qwen/Qwen3", "stream": streamed, "stream_options": {"include_usage": True}, **body}, bearer("alice"))
    usage = usages(got)[-1]
    prompt, completion = (usage[name] for name in names)
    if told:
        assert (prompt, completion) == (11, 7) and "estimated" not in usage
        wait_for(lambda: "tokens_in=11 tokens_out=7" in log.text)
        assert "estimated_" not in log.text
    else:
        assert usage["estimated"] is True and 100 <= prompt <= 115 and 95 <= completion <= 115, usage
        wait_for(lambda: f"estimated_in={prompt} estimated_out={completion} id=" in log.text)
        assert "tokens_in" not in log.text
    known(server)
    found, apart = samples(server, bearer("alice")), "" if told else "estimated_"
    assert found[f"akashproxy_{apart}completion_tokens_total", "akash"] == found[f"akashproxy_key_{apart}tokens_total", "alice", "completion"] == completion
    assert sum(value for name, value in found.items() if name[0].startswith("akashproxy_model_") and name[0].endswith("tokens_total")
               and name[0] == f"akashproxy_model_{apart}tokens_total") == prompt + completion
    assert {name[0] for name in found if "_tokens_total" in name[0] and ("estimated" in name[0]) == told} == set()


@pytest.mark.parametrize("text", ["x" * 7, "\u00e9\u00e8", "\u4e2d\u6587", "\U0001f600", "a\u4e2d\u00e9"])
def test_tokens_are_estimated_alike_however_they_come(text):
    whole, streamed, fast = (akashproxy.ChatCompletions({**BOTH, "stream_options": {"include_usage": True}}) for _ in range(3))
    whole.count(Text(text * 50))
    streamed.opening_frames(), fast.opening_frames()
    streamed.encode([Text(text)] * 50)
    assert all(fast.token_frame(akashproxy.to_json(text)) == fast.text_frame(akashproxy.to_json(text)) for _ in range(50))
    usage = [dialect.count(Finish("stop")).usage for dialect in (whole, streamed, fast)]
    assert usage[0] == usage[1] == usage[2] and usage[0]["completion_tokens"] == akashproxy.estimate_tokens(text * 50)


def test_a_relayed_answer_without_usage_stays_as_it_is(fake, pool, log):
    server = pool(fake)
    assert chat(server, BOTH).body == fake.completion()
    assert chat(server, BOTH, stream=True, stream_options={"include_usage": True}).body == b"".join(fake.events())
    wait_for(lambda: log.text.count("ended=whole") == 2)
    assert "tokens_in" not in log.text and "estimated_in" not in log.text


def test_a_rest_that_is_made_longer_is_one_rest():
    member = members_of({"a": 1}).upstreams[0]
    for now in (0.0, 0.5, 200.0):
        member.record_result(APIError(429, "x", retry_after=100), now, now)
    assert member.cooldown_count == 2 and member.failed == 3


@pytest.mark.parametrize("state, without, given", [("on", 401, 200), ("public", 200, 200), ("off", 401, 404)])
def test_who_may_see_the_metrics(state, without, given, serve):
    server = serve(metrics=state, bearer_token=("t",))
    assert ask(server, path="/metrics").status == without
    assert ask(server, path="/metrics", headers={"Authorization": "Bearer t"}).status == given
    assert ask(server, "HEAD", "/metrics", headers={"Authorization": "Bearer t"}).status == given
    assert ask(server, path="/status").status == 401


def test_histograms_in_the_text_format():
    metrics, name = akashproxy.Metrics(None), "akashproxy_time_to_first_token_seconds"
    for seconds in (0.01, 0.5, 400):
        metrics.observe(name, "b", seconds)
    assert metrics.counts[name, "b", 3] == 1, "a bucket's upper end is in it"
    found = read_samples(akashproxy.prometheus_text(metrics.counts).decode())
    assert [found[f"{name}_bucket", "b", at] for at in ("0.05", "0.25", "0.5", "320", "+Inf")] == [1, 1, 2, 2, 3]
    assert (found[f"{name}_sum", "b"], found[f"{name}_count", "b"]) == (400.51, 3)
    assert akashproxy.sample("n", [("a", 'x"\\\n'), ("b", "")], 1) == r'n{a="x\"\\\n",b=""} 1', "labels are escaped"


def test_prometheus_reads_the_metrics(pool):
    parser = pytest.importorskip("prometheus_client.parser")
    server = pool(FakeOpenAI(), (FakeAkash(), {"priority": 2}))
    for streamed in (False, True):
        chat(server, BOTH, stream=streamed)
    wait_for(lambda: samples(server).get(("akashproxy_request_duration_seconds_count", "a")) == 2)
    families = {family.name: family for family in parser.text_string_to_metric_families(ask(server, path="/metrics").body.decode())}
    assert set(families) == {name[:-6] if name.endswith("_total") else name for name in akashproxy.METRICS}
    for name, (help, *labels) in akashproxy.METRICS.items():
        family = families[name[:-6] if name.endswith("_total") else name]
        kind = "histogram" if name in akashproxy.BUCKETS else "counter" if name.endswith("_total") else "gauge"
        assert (family.type, family.documentation) == (kind, help)
        assert all(set(each.labels) - {"le"} == set(labels) for each in family.samples)
    buckets = [each.value for each in families["akashproxy_request_duration_seconds"].samples if each.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] > 0


def test_every_series_is_in_the_readme():
    found = [(name, labels) for first, labels, *_ in table_rows("Metrics") for name in re.findall("`(.*?)`", first)]
    assert sorted(found) == sorted((name, ", ".join(labels)) for name, (_, *labels) in akashproxy.METRICS.items())
    assert set(re.findall(r"(?:akashproxy|process)_\w+?(?=_bucket|\b)", " ".join(ALARMS.values()))) <= set(akashproxy.METRICS)


ALARMS = dict(re.findall(r"^\| ([\w ]+) \| `(.*?)` \|$", re.search("^### Metrics\n.*?^##", README, re.M | re.S)[0].partition("| alarm |")[2], re.M))

# Samples a minute apart, in promtool's notation: first+step x count. For each alarm: (those that raise it, those that don't).
OK, ROUTE = 'akashproxy_requests_total{status="200"}', 'akashproxy_requests_total{status="502"}'
SLOW, FAST = ('akashproxy_time_to_first_token_seconds_bucket{le="%s"}' % le for le in ("20", "0.5"))
ALL = 'akashproxy_time_to_first_token_seconds_bucket{le="+Inf"}'
RESTING = 'akashproxy_controller_resting{controller="%s"}'
SERIES = {
    "answers fail": ({OK: "0+100x20", ROUTE: "0+5x20"}, {OK: "0+100x20", ROUTE: "0+1x20"}),
    "first tokens are slow": ({FAST: "0+9x20", SLOW: "0+10x20", ALL: "0+10x20"}, {FAST: "0+10x20", SLOW: "0+10x20", ALL: "0+10x20"}),
    "all controllers are cooling down": ({RESTING % "a": "1+0x20", RESTING % "b": "1+0x20"}, {RESTING % "a": "1+0x20", RESTING % "b": "0+0x20"}),
    "a controller fails repeatedly": ({'akashproxy_controller_rests_total{controller="a"}': "0+1x20"}, {'akashproxy_controller_rests_total{controller="a"}': "7+0x20"}),
    "the core is fully used": ({"process_cpu_seconds_total": "0+59x20"}, {"process_cpu_seconds_total": "0+30x20"}),
    "it restarts": ({"process_start_time_seconds": "0+1x20"}, {"process_start_time_seconds": "5+0x20"}),
}


class Vector(dict):
    """PromQL's instant vector, {labels: value}, as far as the alarms need it."""

    def __truediv__(self, other):
        return Vector({labels: value / other[labels] for labels, value in self.items() if other.get(labels)})

    def __gt__(self, limit):
        return Vector({labels: value for labels, value in self.items() if value > limit})

    def __ge__(self, limit):
        return Vector({labels: value for labels, value in self.items() if value >= limit})


def promql(expression, series):
    """The value of an expression at the last sample."""
    def select(name, wanted, minutes):
        found = {}
        for text, samples in series.items():
            labels = dict(re.findall(r'(\w+)="(.*?)"', text))
            first, step, count = map(int, re.split(r"[+x]", samples))
            if text.partition("{")[0] == name and all(re.fullmatch(value, labels.get(label, "")) for label, value in re.findall(r'(\w+)=~?"(.*?)"', wanted)):
                found[frozenset(labels.items())] = [first + step * at for at in range(count + 1)][-minutes - 1:]
        return found

    over = lambda function: lambda ranges: Vector({labels: function(values) for labels, values in ranges.items()})

    def group(function, names=()):
        def aggregate(vector):
            groups = collections.defaultdict(list)
            for labels, value in vector.items():
                groups[frozenset(pair for pair in labels if pair[0] in names)].append(value)
            return Vector({labels: function(values) for labels, values in groups.items()})
        return aggregate

    def quantile(share, vector):
        buckets = sorted((float(dict(labels)["le"].replace("+Inf", "inf")), value) for labels, value in vector.items())
        rank = share * buckets[-1][1]
        at = next(at for at, (_, count) in enumerate(buckets) if count >= rank)
        (low, under), (high, count) = buckets[at - 1] if at else (0, 0), buckets[at]
        return Vector({frozenset(): low if high == math.inf else low + (high - low) * (rank - under) / (count - under)})

    code = re.sub(r"sum by \((\w+)\)", r"sum_by('\1')", expression)
    code = re.sub(r"((?:akashproxy|process)_\w+)(\{.*?\})?(?:\[(\d+)m\])?",
                  lambda match: f"{'select' if match[3] else 'instant'}({match[1]!r}, {match[2] or ''!r}, {match[3] or 0})", code)
    return eval(code, {
        "select": select, "instant": lambda *wanted: over(lambda values: values[-1])(select(*wanted)), "sum": group(sum), "min": group(min),
        "sum_by": lambda *names: group(sum, names), "histogram_quantile": quantile, "increase": over(lambda values: values[-1] - values[0]),
        "rate": over(lambda values: (values[-1] - values[0]) / 60 / (len(values) - 1)),
        "changes": over(lambda values: sum(one != other for one, other in zip(values, values[1:]))),
    })


@pytest.mark.parametrize("alarm", ALARMS)
def test_each_alarm_is_raised_when_it_must_be(alarm):
    raising, quiet = SERIES[alarm]
    assert promql(ALARMS[alarm], raising) and not promql(ALARMS[alarm], quiet)


def test_prometheus_itself_raises_the_alarms(tmp_path):
    """What our small reading of PromQL says is what Prometheus says."""
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "akashproxy", "rules": [
        {"alert": name.replace(" ", "_"), "expr": expression} for name, expression in ALARMS.items()]}]}))
    (tmp_path / "tests.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": [{
        "interval": "1m", "input_series": [{"series": each, "values": values} for each, values in samples.items()],
        "promql_expr_test": [{"expr": f"count({ALARMS[name]}) or vector(0)", "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": int(raised)}]}],
    } for name, cases in SERIES.items() for samples, raised in zip(cases, (True, False))]}))
    done = subprocess.run(["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_models_tokens_and_attempts_are_counted_by_name(pool):
    one, other = FakeOpenAI(["listed"]), FakeOpenAI(["listed"])
    one.faults.extend([one.status(500)])
    answer = {**json.loads(other.completion()), "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}}
    other.faults.extend([lambda sock, request: sock.sendall(reply(body=answer)) or True])
    server = pool(one, (other, {"priority": 2}), keys=(akashproxy.ClientKeySettings(name="ann", key="k-ann"),))
    key = {"Authorization": "Bearer k-ann"}
    server.pool.models()
    body = {"model": "listed", "max_tokens": 9, "messages": [user("hi")]}
    assert ask(server, "POST", "/v1/messages", body, key).status == 200
    for at in range(3):
        chat(server, {**CHAT, "model": f"made-up-{at}"}, key)
    wait_for(lambda: samples(server, key).get(("akashproxy_model_requests_total", "other")) == 3)
    found = samples(server, key)
    assert found["akashproxy_model_requests_total", "listed"] == 1
    assert {(kind, found["akashproxy_model_tokens_total", "listed", kind]) for kind in ("prompt", "completion")} == {("prompt", 11), ("completion", 5)}
    assert found["akashproxy_key_tokens_total", "ann", "prompt"] == 11
    assert found["akashproxy_upstream_requests_total", "a", "server"] == 1 and found["akashproxy_upstream_requests_total", "b", "success"] >= 1
    assert found["akashproxy_requests_waiting",] == 0 and found["process_resident_memory_bytes",] > 1e6
    assert 0 < found["process_open_fds",] < found["process_max_fds",]


def test_the_model_of_a_lone_controller_is_counted_by_name(pool):
    """Without a request for /v1/models: the first one for /metrics reads the list."""
    fake = FakeOpenAI(["listed"])
    server = pool(fake)
    samples(server)
    wait_for(lambda: "listed" in server.pool.model_names)
    chat(server, {**BOTH, "model": "listed"})
    wait_for(lambda: samples(server).get(("akashproxy_model_requests_total", "listed")) == 1)
    assert [request.path for request in fake.requests].count("/v1/models") == 1


def test_a_model_has_a_series_of_its_own_only_while_there_are_few():
    metrics = akashproxy.Metrics(argparse.Namespace(pool=argparse.Namespace(model_names=[f"m{at}" for at in range(500)])))
    labels = {metrics.model_label(f"m{at}") for at in range(500)} | {metrics.model_label("unknown")}
    assert len(labels) == akashproxy.MAX_MODEL_LABELS + 1 and "other" in labels


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_lines(form, akash):
    with started("--log-format", form, AKASH_BASE_URL=akash.url) as (process, server):
        stream(server, {"model": "demo", "messages": [user("secret words")]})
        ask(server, path="/no%0Awhere%1b[31m", headers={"Authorization": "Bearer s3cret"})
        process.terminate()
        lines = sorted(process.communicate(timeout=20)[1].splitlines(), key=lambda line: "where" in line)    # either may be the first
    assert len(lines) == 2 and not any("secret" in line or "s3cret" in line or "\x1b" in line for line in lines)
    if form == "json":
        first, second = map(json.loads, lines)
        assert {"time", "client", "method", "path", "status", "model", "controller", "first_ms", "ms", "bytes", "tokens_in", "tokens_out",
                "id"} <= set(first)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", first["time"]), "RFC 3339"
        assert (first["status"], first["model"], first["controller"], second["path"]) == (200, "demo", "akash", "/no\nwhere\x1b[31m")
    else:
        assert re.search(r" INFO client=127\.0\.0\.1 method=POST path=/v1/chat/completions status=200 ended=whole model=demo controller=akash "
                         r"first_ms=\d+ ms=\d+ bytes=\d+ estimated_in=\d+ estimated_out=\d+ id=req_\w+$", lines[0]) and "path=/no\\nwhere\\x1b[31m status=404" in lines[1]


def test_the_first_token_is_not_later_than_the_end(pool, log):
    server = pool(FakeOpenAI())
    for _ in range(40):
        ask(server, path="/status")
    times = lambda: re.findall(r"first_ms=(\d+) ms=(\d+)", log.text)
    wait_for(lambda: len(times()) == 40)
    assert all(int(first) <= int(end) for first, end in times())


@pytest.mark.parametrize("fault, ended", [(None, "whole"), ("cut", "broken_off"), ("refused", "refused"), ("left", "client_left"), ("probe", None)])
def test_the_log_says_how_a_response_ended(fault, ended, fake, pool, log):
    server, body = pool(fake), {**BOTH, "stream": True}
    fake.faults.extend({"left": [fake.stall(1)], "cut": [fake.cut(1)]}.get(fault, []))
    if fault == "left":
        with connect(server, post("/v1/chat/completions", body)) as sock:
            assert sock.recv(65536)
    elif fault == "probe":
        ask(server, path="/health"), ask(server, path="/metrics")
    else:
        chat(server, {"model": 5} if fault == "refused" else body)
    wait_for(lambda: ended is None or f" ended={ended} " in log.text)
    assert ended is not None or "ended=" not in log.text


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_trace_goes_to_the_upstream_and_into_the_log(path, fake, pool, log):
    ask(pool(fake), "POST", path, WANTS[path], {"traceparent": TRACE, "tracestate": "a=b"})
    assert (fake.requests[-1].headers["traceparent"], fake.requests[-1].headers["tracestate"]) == (TRACE, "a=b")
    wait_for(lambda: f" trace={TRACE[3:35]} " in log.text)
    for malformed in ("00", TRACE + "x", TRACE.upper(), "x" * 300):
        ask(pool(fake), "POST", path, WANTS[path], {"traceparent": malformed})
    wait_for(lambda: log.text.count(f" path={path} ") == 5)
    assert log.text.count(" trace=") == 1


# == keys =====================================================================================


def test_keys_in_a_file(config):
    path = config({"keys": [{"name": "alice", "key": "${A}", "models": ["gpt-*"], "requests_per_minute": 60, "max_concurrency": 4},
                            {"name": "bob", "key": "b"}]})
    settings = load(path, A="s3cret")
    assert [dataclasses.astuple(key) for key in settings.keys] == [("alice", "s3cret", ("gpt-*",), 60, 4, ()), ("bob", "b", (), 0, 0, ())]
    assert "s3cret" not in repr(settings)
    displayed = run("--config-file", path, "--check", A="s3cret").stdout
    assert "[key alice]\nkey=********\nmodels=gpt-*\nrequests_per_minute=60\nmax_concurrency=4" in displayed and "s3cret" not in displayed


@table({    # limits: (seconds, what is done, the seconds to wait or None if it is let in)
    "none": ({}, [(0, "acquire", None)] * 100),
    "three a minute": ({"requests_per_minute": 3}, [
        (0, "acquire", None), (0, "acquire", None), (0, "acquire", None), (0, "acquire", 20), (19, "acquire", 1), (20, "acquire", None), (20, "acquire", 20),
        (1000, "acquire", None), (1000, "acquire", None), (1000, "acquire", None), (1000, "acquire", 20)]),
    "seven a minute": ({"requests_per_minute": 7}, [(5, "acquire", None)] * 7 + [(5, "acquire", 60 / 7)]),
    "one at a time": ({"max_concurrency": 1}, [
        (0, "acquire", None), (0, "acquire", 1), (5, "acquire", 1), (5, "release", None), (5, "acquire", None), (5, "acquire", 1)]),
    "what is refused costs nothing": ({"max_concurrency": 1, "requests_per_minute": 2}, [
        (0, "acquire", None), (0, "acquire", 1), (0, "acquire", 1), (0, "release", None), (0, "acquire", None), (0, "release", None), (0, "acquire", 30)]),
})
def test_limits(options, steps):
    clock = Clock()
    began = clock()
    limits = akashproxy.KeyLimiter(akashproxy.ClientKeySettings(name="alice", key="k", **options), clock)
    for at, what, wait in steps:
        clock.now = began + at
        if wait is None:
            getattr(limits, what)()
            continue
        error = error_of(APIError, limits.acquire)
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.retry_after == pytest.approx(wait) and "'alice'" in error.message
    done = [wait for _, what, wait in steps if what == "acquire"]
    assert limits.status() == {"name": "alice", "in_flight": done.count(None) - sum(what == "release" for _, what, _ in steps),
                               "requests": done.count(None), "refused": len(done) - done.count(None)}


def test_a_request_for_images_counts_as_many_times_as_it_makes():
    limits = akashproxy.KeyLimiter(*keys("alice", requests_per_minute=12, max_concurrency=1), Clock())
    limits.acquire(10)
    limits.release()
    for count, wait in ((3, 5), (10, 40)):
        error = error_of(APIError, limits.acquire, count)
        assert (error.status, error.retry_after) == (429, pytest.approx(wait))
    limits.acquire(2)
    assert (limits.in_flight, limits.requests) == (1, 12)
    with pytest.raises(APIError, match="at most 12") as caught:     # more than it could ever have
        limits.acquire(13)
    assert caught.value.status == 400


@table({
    "a number": (b'{"model":"both","n":4}', "application/json"), "a decimal": (b'{"model":"both","n":4.0}', "application/json"),
    "a text": (b'{"model":"both","n":" 4"}', "application/json"), "a capital": (b'{"model":"both","n":1,"N":4}', "application/json"),
    "a form": (b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n4\r\n--x--\r\n', "multipart/form-data; boundary=x"),
    "one of names and values": (b"model=both&n=1&n=4", "application/x-www-form-urlencoded"),
})
def test_a_count_of_images_is_read_as_upstreams_read_it(body, kind, fake, pool):
    server = pool(fake, keys=keys("alice", requests_per_minute=50))
    for path, count in (("/v1/images/edits", 4), ("/v1/embeddings", 5)):
        ask(server, "POST", path, body, {**bearer("alice"), "Content-Type": kind})
        assert counts(server) == (0, count, 0)


def test_relayed_requests_for_images_count_as_well(pool):
    server = pool(FakeOpenAI(), keys=keys("alice", requests_per_minute=5))
    for path, n, refused in (("/v1/images/generations", 2, 0), ("/v1/images/edits", 3, 0), ("/v1/images/generations", 1, 1)):
        got = ask(server, "POST", path, {"model": "both", "prompt": "x", "n": n}, {**bearer("alice"), "Content-Type": "application/json"})
        assert got.status == (429 if refused else 404) and counts(server) == (0, 5 if path.endswith("edits") or refused else 2, refused)


@pytest.mark.parametrize("where", ["key", "controller"])
def test_images_are_made_one_after_the_other_where_requests_are_limited(where, akash, serve):
    akash.chat = PICTURE_LINE
    limits = {"max_concurrency": 1}
    server = serve(keys=keys("alice", **(limits if where == "key" else {})), controllers=(
        akashproxy.ControllerSettings(type="akash", base_url=akash.url, **(limits if where == "controller" else {})),))
    assert len(ask(server, "POST", "/v1/images/generations", {"prompt": "x", "n": 3}, bearer("alice")).json["data"]) == 3
    order = [request.method for request in akash.requests if "chat" in request.path or "image-status" in request.path]
    assert order == ["POST", "GET"] * 3


def test_images_end_with_their_client(akash, serve):
    akash.chat = PICTURE_LINE
    akash.states.extend([{"status": "waiting", "queue_position": 1}] * 100000)
    server = serve(keys=keys("alice", max_concurrency=1))
    for number in range(12):
        with connect(server) as sock:
            started = len(akash.bodies())
            sock.sendall(post("/v1/images/generations", {"prompt": f"x{number}", "n": 10}, "Authorization: Bearer alice-key"))
            wait_for(lambda: len(akash.bodies()) > started)
        wait_for(lambda: counts(server)[0] == 0)
    assert len(akash.bodies()) == 12 and counts(server) == (0, 120, 0)
    asked = [request.path for request in akash.requests if request.path != "/api/models/"]
    wait_for(lambda: samples(server, bearer("alice"))["akashproxy_open_connections",] == 1)
    assert [request.path for request in akash.requests if request.path != "/api/models/"] == asked, "nor are they asked for any more"


def test_no_image_is_begun_for_a_client_that_has_left(akash, serve):
    server, left = serve(), threading.Event()
    sock = connect(server)

    def leave(upstream, request):       # after the first of ten
        if not left.is_set():
            sock.close()
            left.set()
        upstream.sendall(STREAM_HEAD + chunks(PICTURE_LINE))
        return True

    akash.faults.extend([leave] * 10)
    sock.sendall(post("/v1/images/generations", {"prompt": "x", "n": 10}))
    wait_for(lambda: left.is_set() and samples(server)["akashproxy_open_connections",] == 1)
    assert len(akash.bodies()) <= 2       # the end of the connection may be on its way for a moment


def test_many_threads_are_let_in_exactly_as_often_as_they_may():
    limits = akashproxy.KeyLimiter(*keys("alice", requests_per_minute=1000, max_concurrency=1000), Clock())

    def enter():
        with contextlib.suppress(APIError):
            limits.acquire()
            limits.release()

    at_once(enter, 3000)
    assert (limits.in_flight, limits.requests, limits.rejected) == (0, 1000, 2000)


def test_who_asks_is_known_by_the_key(serve, log):
    server = serve(keys=keys("alice", "bob"), bearer_token=("t",))
    for headers in ({}, bearer("carol"), {"Authorization": "Bearer alice"}, {"x-api-key": "alice-ke"}):
        assert chat(server, headers=headers).status == 401
    for headers in (bearer("alice"), {"x-api-key": "alice-key"}, bearer("bob"), {"Authorization": "Bearer t"}):
        assert chat(server, headers=headers).status == 200
    for path in ("/v1/models", "/status", "/metrics", "/health"):
        assert ask(server, path=path, headers=bearer("alice")).status == 200
    status = ask(server, path="/status", headers=bearer("bob"))
    assert status.json["keys"] == [{"name": "alice", "in_flight": 0, "requests": 2, "refused": 0},
                                   {"name": "bob", "in_flight": 0, "requests": 1, "refused": 0}]
    found = samples(server, bearer("alice"))
    assert found["akashproxy_key_requests_total", "alice"] == 2 and found["akashproxy_key_refused_total", "bob"] == 0
    assert " key=alice method=POST" in log.text
    assert "-key" not in log.text + status.body.decode()


def test_a_rate_on_the_wire(serve):
    server = serve(keys=keys("alice", requests_per_minute=2) + keys("bob"))
    for path, status in (("/v1/chat/completions", 200), ("/v1/embeddings", 404)):      # what came of it does not matter
        assert ask(server, "POST", path, CHAT, bearer("alice")).status == status
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/messages/count_tokens"):
        got = ask(server, "POST", path, CHAT, bearer("alice"))
        assert (got.status, got.headers["retry-after"]) == (429, "30") and "'alice' is 2 per minute" in got.json["error"]["message"]
    assert got.json["error"]["type"] == "rate_limit_error" and got.json["type"] == "error", "in the client's own dialect"
    for path in ("/v1/models", "/status", "/metrics", "/health"):
        assert ask(server, path=path, headers=bearer("alice")).status == 200
    assert chat(server, headers=bearer("bob")).status == 200
    assert ask(server, "POST", "/v1/chat/completions", b"{", bearer("alice")).status == 400, "what is no call does not count"
    assert counts(server) == (0, 2, 3)


@table({    # a name: (a fault, the client's body, does the client leave?)
    "a whole answer": (None, {}, False), "a stream": (None, {"stream": True}, False),
    "an error": (does("status", 400), {}, False), "an error of a stream": (does("status", 500), {"stream": True}, False),
    "a stream that is cut": (does("cut", 1), {"stream": True}, False), "an answer that is cut": (does("cut"), {}, False),
    "an upstream that hangs up": (does("refuse"), {}, False), "garbage": (does("raw", b"\0"), {"stream": True}, False),
    "a client that leaves": (does("stall"), {}, True), "a client that leaves a stream": (does("stall", 1), {"stream": True}, True),
    "an unknown model": (None, {"model": ""}, False), "a mistake": (None, {"messages": 7}, False),
})
def test_a_call_is_in_flight_until_it_is_over(fault, fields, leaves, a, pool):
    server = pool(a, keys=keys("alice", max_concurrency=1))
    for asked in range(2):
        end_cooldowns(server)
        if fault:
            a.faults.append(fault(a))
        if leaves:
            a.gone.clear()
            with connect(server, post("/v1/chat/completions", {**BOTH, **fields}, "Authorization: Bearer alice-key")):
                wait_for(lambda: len(a.bodies()) > asked)
                assert counts(server)[0] == 1
                got = chat(server, BOTH, bearer("alice"))
                assert (got.status, got.headers["retry-after"]) == (429, "1") and "1 at a time" in got.json["error"]["message"]
            wait_for(a.gone.is_set)
        else:
            with contextlib.suppress(http.client.IncompleteRead):
                assert chat(server, BOTH, bearer("alice"), **fields).status != 429
        wait_for(lambda: counts(server)[0] == 0)
    assert chat(server, BOTH, bearer("alice")).status != 429


class LateConnection(akashproxy.Connection):
    """A connection of which the loop ends each request late."""

    def end_request(self):
        self.flush()
        threading.Timer(0.3, self.loop.call_soon_threadsafe, [super().end_request]).start()


class LateServer(Server):
    def process_request(self, request, client_address):
        connection = LateConnection(request, client_address, self)
        self.connections.add(connection)
        connection.set_deadline(20)


def test_the_next_call_can_be_made_as_soon_as_the_last_one_is_answered():
    """However long the loop takes for the end of a request: a client that has its answer is no longer in flight."""
    with LateServer(Settings(server_address="127.0.0.1:0", controllers=(ECHO,), keys=keys("alice", max_concurrency=1))) as server:
        for fields, status in (({}, 200), ({"stream": True}, 200), ({"messages": 7}, 400)):
            got = chat(server, {"model": "echo", "messages": [user("a b")], **fields}, bearer("alice"))
            assert got.status == status, got
        for _ in range(2):
            assert ask(server, "POST", "/v1/images/generations", {"prompt": "x"}, bearer("alice")).status == 404


def test_a_stop_that_waits_no_longer_ends_each_call_once(a, pool):
    server = pool(a.faulting(a.stall(1), a.stall()), keys=keys("alice", max_concurrency=2))
    calls = [later(chat, server, BOTH, bearer("alice"), stream=True)]
    wait_for(lambda: any(relay.exchange.committed for relay in relays(server)))
    calls.append(later(chat, server, BOTH, bearer("alice")))
    wait_for(lambda: len(a.bodies()) == 2)
    assert counts(server)[0] == 2
    server.stop(0.05)
    assert all(b'"error":{"message":"The server is stopping' in call.result().body for call in calls) and counts(server)[0] == 0


def test_models_of_a_key(pool):
    a = FakeOpenAI(models=["gpt-x", "both", "org/name"])
    server = pool(a, keys=keys("alice", models=("gpt-*", "org/name")) + keys("bob"), model_aliases={"claude-*": "gpt-x", "gpt-b": "both"})
    assert [model["id"] for model in ask(server, path="/v1/models", headers=bearer("alice")).json["data"]] == ["gpt-x", "org/name"]
    assert len(ask(server, path="/v1/models", headers=bearer("bob")).json["data"]) == 3
    for name, status in {"gpt-x": 200, "claude-3": 200, "org--name": 200, "org/name": 200, "both": 404, "gpt-b": 404, "nothing": 404}.items():
        assert chat(server, BOTH, bearer("alice"), model=name).status == status, name
        assert ask(server, path=f"/v1/models/{name}", headers=bearer("alice")).status == status, name
    assert chat(server, BOTH, bearer("bob"), model="gpt-b").status == 200
    unknown = chat(server, BOTH, bearer("bob"), model="nothing")
    assert unknown.status == 200, "it may be tried"
    asked = len(a.bodies())
    for path, body in (("/v1/chat/completions", {**BOTH, "model": "both"}), ("/v1/embeddings", {"model": "both", "input": "x"}),
                       ("/v1/completions", {"model": "both", "prompt": "x"}), ("/v1/responses", {"model": "both", "input": "x"}),
                       ("/v1/embeddings", {"input": "x"}), ("/v1/images/generations", {"prompt": "x"}), ("/v1/audio/speech", b"model=gpt-x")):
        got = ask(server, "POST", path, body, bearer("alice"))
        assert (got.status, got.json["error"]["code"]) == (404, "model_not_found"), path
    refused = chat(server, BOTH, bearer("alice"), model="gpt-b").json["error"]
    assert refused["message"] == ("The model 'gpt-b' does not exist. /v1/models lists the available models. Did you mean 'gpt-x'?"
                                  ), "nothing is told of what it stands for"
    assert ask(server, "POST", "/v1/messages", {**BOTH, "max_tokens": 9}, bearer("alice")).json["error"]["type"] == "not_found_error"
    assert len(a.bodies()) == asked


def test_a_reload_keeps_the_counts_of_keys_that_stay(a, pool):
    server = pool(a, keys=keys("alice", "bob", max_concurrency=1))
    member = server.pool.upstreams[0]
    a.faults.append(a.stall(1))
    with connect(server, post("/v1/chat/completions", {**BOTH, "stream": True}, "Authorization: Bearer alice-key")):
        wait_for(a.bodies)
        changed = akashproxy.ClientKeySettings(name="alice", key="new-key", max_concurrency=1)
        server.reload(dataclasses.replace(server.settings, keys=(changed, *keys("carol"))))
        assert server.pool.upstreams[0] is member, "the controllers go on as they are"
        assert chat(server, BOTH, bearer("alice")).status == chat(server, BOTH, bearer("bob")).status == 401
        assert chat(server, BOTH, bearer("new")).status == 429 and chat(server, BOTH, bearer("carol")).status == 200
        assert (counts(server), counts(server, "carol")) == ((1, 1, 1), (0, 1, 0))
    wait_for(lambda: counts(server) == (0, 1, 1))
    assert chat(server, BOTH, bearer("new")).status == 200


# == access: bodies, origins, hosts and the limits of keys ====================================
# What a client may do before anything is kept or asked for it: bodies, pages of other sites, limits of keys.


@pytest.mark.parametrize("framing", ["Content-Length: 33554432", "Content-Length: 5", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("method, path", [("GET", "/health"), ("HEAD", "/"), ("GET", "/v1/models"), ("OPTIONS", "/v1/models"),
                                          ("GET", "/images/x.png"), ("DELETE", "/v1/responses/x"), ("GET", "/status")])
def test_a_body_that_is_not_needed_is_not_waited_for(method, path, framing, serve):
    with connect(serve(), head_of(method, path, framing) + b"5") as sock:
        got = receive(sock, b"\r\n\r\n")
        assert b"\r\nConnection: close\r\n" in got and b"100 Continue" not in got
        sock.shutdown(socket.SHUT_WR)
        receive(sock)


@table({    # name: (method, path, header fields, status)
    "no token": ("POST", "/v1/chat/completions", ["Content-Length: 1000"], 401),
    "a wrong token": ("POST", "/v1/embeddings", ["Authorization: Bearer x", "Content-Length: 1000"], 401),
    "no such path": ("POST", "/nowhere", ["x-api-key: k", "Content-Length: 1000"], 404),
    "a wrong method": ("PUT", "/v1/chat/completions", ["x-api-key: k", "Content-Length: 1000"], 405),
    "a large body": ("POST", "/v1/chat/completions", ["x-api-key: k", "Content-Length: 33554433"], 413),
    "another site's page": ("POST", "/v1/chat/completions", ["x-api-key: k", "Origin: https://b.example", "Content-Length: 1000"], 403),
    "a chunked body without a token": ("POST", "/v1/responses", ["Transfer-Encoding: chunked"], 401),
})
def test_what_a_head_says_is_refused_before_the_body(method, path, fields, status, serve):
    server = serve(bearer_token=("k",), cors_origins=("https://a.example",))
    with connect(server, head_of(method, path, *fields, "Expect: 100-continue")) as sock:
        assert status_of(sock) == status


@needs_proc
def test_slow_bodies_have_no_threads(akash):
    with started(AKASH_BASE_URL=akash.url) as (process, port), contextlib.ExitStack() as stack:
        for at in range(300):
            sock = stack.enter_context(connect(port, head_of("POST", "/v1/chat/completions", "Content-Length: 1000000") + b"{"))
            if at % 2:
                sock.sendall(b'"')
        with connect(port, head_of("GET", "/health")) as sock:
            assert status_of(sock) == 200
        assert proc_status(process, "Threads") < 12


@needs_proc
@pytest.mark.parametrize("method, path, status", [("GET", "/health", 200), ("POST", "/v1/chat/completions", 401), ("POST", "/", 405)])
def test_nothing_is_kept_of_bodies_without_a_token(method, path, status, akash):
    with started(AKASH_BASE_URL=akash.url, BEARER_TOKEN="k") as (process, port), contextlib.ExitStack() as stack:
        before = proc_status(process, "VmRSS")
        for _ in range(20):
            sock = stack.enter_context(connect(port, head_of(method, path, "Content-Length: 33554432")))
            assert status_of(sock) == status
            with contextlib.suppress(OSError):
                for _ in range(31):
                    sock.sendall(bytes(1 << 20))
        assert proc_status(process, "VmRSS") - before < 16 << 10


def test_much_at_once_buys_no_time(serve):
    server = serve(body_timeout=0.5)
    with connect(server, head_of("POST", "/v1/chat/completions", "Content-Length: 33554432") + bytes(31 << 20)) as sock:
        start = time.monotonic()
        assert status_of(sock) == 408
        assert time.monotonic() - start < 5, "at the least pace it could have taken two hours"


def test_a_trickle_is_ended(serve):
    with connect(serve(body_timeout=0.15), head_of("POST", "/v1/chat/completions", "Content-Length: 33554432"), 0.01) as sock:
        end, got = time.monotonic() + 10, b""
        while not got and time.monotonic() < end:
            with contextlib.suppress(socket.timeout):
                sock.sendall(b"x")
                got = sock.recv(100)
        assert got.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_a_body_byte_by_byte(framing, akash, serve):
    data = json.dumps(CHAT).encode()
    fields = {"sized": f"Content-Length: {len(data)}", "chunked": "Transfer-Encoding: chunked"}
    body = data if framing == "sized" else b"".join(chunk(data[at:at + 1]) for at in range(len(data))) + b"0\r\n\r\n"
    with connect(serve(), head_of("POST", "/v1/chat/completions", fields[framing])) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(body)):
            sock.sendall(body[at:at + 1])
        assert status_of(sock) == 200
        sock.sendall(head_of("GET", "/health"))
        assert b"200 OK" in sock.recv(65536)
    assert akash.bodies()[0]["messages"] == CHAT["messages"]


def test_a_slow_body_may_follow_an_answer_that_a_thread_gave(akash, serve):
    large, small = (json.dumps({**CHAT, "padding": "x" * size}).encode() for size in (200000, 1000))
    with connect(serve()) as sock:
        for _ in range(3):
            sock.sendall(post("/v1/chat/completions", large, "Connection: keep-alive") + post("/v1/chat/completions", small)[:-500])
            assert status_of(sock) == 200
            sock.sendall(small[-500:])
            assert status_of(sock) == 200
    assert len(akash.bodies()) == 6


def test_all_bodies_together_have_a_bound(akash, serve):
    server = serve(max_body_total=100000, body_timeout=20)
    path, data = "/v1/chat/completions", json.dumps({**CHAT, "padding": "x" * 70000}).encode()
    started = head_of("POST", path, "Content-Length: 50000") + b"x" * 45000
    with connect(server, started), connect(server, started):
        wait_for(lambda: ask(server, "POST", path, data).status == 503)
        refused = ask(server, "POST", path, data)
        assert (refused.status, refused.headers["retry-after"], refused.json["error"]["code"]) == (503, "1", "overloaded")
        assert ask(server, "POST", "/v1/messages", data).status == 529
        with connect(server, head_of("POST", path, "Transfer-Encoding: chunked") + chunk(b"x" * 20000)) as sock:
            assert status_of(sock) == 503
        assert chat(server).status == 200, "a body that comes with its head is never kept"
        assert ask(server, path="/v1/models").status == 200
    wait_for(lambda: ask(server, "POST", path, data).status == 200)


PADDED = json.dumps({**CHAT, "padding": "x" * 80000}).encode()
SIZED_HEAD, CHUNKED_HEAD = (head_of("POST", "/v1/chat/completions", field) for field in (f"Content-Length: {len(PADDED)}", "Transfer-Encoding: chunked"))


@table({
    # how a body ends: (its head, what comes of it, what follows, the status, None: the client leaves)
    "whole": (SIZED_HEAD, PADDED[:60000], PADDED[60000:], 200), "left": (SIZED_HEAD, PADDED[:60000], b"", None),
    "reset": (SIZED_HEAD, PADDED[:60000], b"", "reset"), "late": (SIZED_HEAD, PADDED[:60000], b"", 408),
    "large": (CHUNKED_HEAD, chunk(b"x" * 60000), chunk(b"x" * 60000), 413), "malformed": (CHUNKED_HEAD, chunk(b"x" * 60000), b"z\r\n", 400),
    "declared only": (SIZED_HEAD, b"", b"", None), "unread": (head_of("GET", "/v1/models", f"Content-Length: {len(PADDED)}"), PADDED[:60000], b"", 200),
})
def test_what_a_body_took_is_given_back_however_it_ends(head, begun, rest, status, akash, serve):
    server = serve(max_body=90000, max_body_total=100000, body_timeout=0.2 if status == 408 else 20)
    accepted = lambda: ask(server, "POST", "/v1/chat/completions", PADDED).status == 200
    for _ in range(3):
        with connect(server, head + begun) as sock:
            assert begun or accepted(), "a length that is only declared takes nothing"
            if status == "reset":
                reset(sock)
            elif status:
                sock.sendall(rest)
                assert status_of(sock) == status
        wait_for(accepted)


# -- pages of other sites

OWN = "http://127.0.0.1:{port}"
LOCAL_ORIGINS = ["http://localhost:3000", "https://localhost", "http://127.0.0.1:8080", "http://127.9.9.9", "http://[::1]:5173",
                 "http://app.localhost:3000"]
FOREIGN_ORIGINS = ["https://b.example", "null", "http://localhost.b.example", "http://127.0.0.1.b.example", "http://b.example:16571",
                   "chrome-extension://abcdef", "vscode-webview://x", "app://obsidian.md", "file://", "ftp://localhost",
                   "http://localhost@b.example", "http://b.example/.localhost", "http://localhost:b.example", "http://192.168.1.2",
                   "https://a.example.b.example", "http://a.example", "https://a.example, https://b.example", "http://evillocalhost",
                   "http://", "http://127.1", "http://127.0.0.1:1:1", "http://[::2]", "http://::1", "http://0.0.0.0", "http://localhost.x",
                   "http://x/.localhost", "http://x@localhost", "http://x#.localhost", "http://x\\.localhost", "http://localhost,x.localhost"]
CALLS = {"chat": ("POST", "/v1/chat/completions", "application/json"), "simple": ("POST", "/v1/chat/completions", "text/plain"),
         "embeddings": ("POST", "/v1/embeddings", "text/plain"), "models": ("GET", "/v1/models", ""), "status": ("GET", "/status", ""),
         "metrics": ("GET", "/metrics", ""), "head": ("HEAD", "/v1/models", ""), "preflight": ("OPTIONS", "/v1/chat/completions", ""),
         "anthropic": ("POST", "/v1/messages", "text/plain"), "health": ("GET", "/health", "")}


@pytest.mark.parametrize("listed", ["default", "a list", "everybody"])
@pytest.mark.parametrize("token", [False, True])
def test_pages_of_other_sites(token, listed, fake, pool):
    cors = {"default": (), "a list": ("https://a.example", "app://mine"), "everybody": ("*",)}[listed]
    server = pool(fake, cors_origins=cors, bearer_token=("k",) if token else ())
    known(server)
    rules = {OWN.format(port=server.server_port): True, "https://a.example": listed != "default" or token,
             "app://mine": listed != "default" or token, **dict.fromkeys(LOCAL_ORIGINS, listed != "a list"),
             **dict.fromkeys(FOREIGN_ORIGINS, listed == "everybody" or listed == "default" and token)}
    rules[""] = True
    with link_to(server) as link:
        for origin, allowed in rules.items():
            for name, (method, path, kind) in CALLS.items():
                asked = len(fake.requests)
                headers = {"Content-Type": kind, **({"Origin": origin} if origin else {}), **({"x-api-key": "k"} if token else {})}
                got = ask_again(link, method, path, {**BOTH, "max_tokens": 9} if method == "POST" else None, headers)
                assert (got.status != 403) == allowed, (origin, name, got)
                allow_origin = got.headers.get("access-control-allow-origin")
                if not allowed:
                    assert len(fake.requests) == asked and allow_origin is None and got.headers["x-should-retry"] == "false"
                    assert method in ("HEAD",) or "CORS_ORIGINS" in got.json["error"]["message"]
                    assert path != "/v1/messages" or got.json["type"] == "error"
                elif origin:
                    assert allow_origin == ("*" if listed == "everybody" or listed == "default" and token else origin), (origin, name)
                if allow_origin != "*":
                    assert got.headers["vary"] == "Origin"


def test_the_page_of_a_server_with_another_name_is_its_own(serve):
    server = serve(public_url="https://chat.example/ai")
    for host, origin, status in (("chat.example", "https://chat.example", 200), ("localhost:1", "https://chat.example", 200),
                                 ("chat.example", "http://chat.example", 200), ("localhost", "https://chat.example:8443", 403),
                                 ("localhost", "https://other.example", 403), ("chat.example", "https://other.example", 403)):
        assert ask(server, path="/v1/models", headers={"Host": host, "Origin": origin}).status == status, (host, origin)


HOSTS = {   # a Host: is it served by a server on a loopback address that needs no token?
    "localhost": True, "localhost:16571": True, "LOCALHOST:1": True, "a.localhost": True, "localhost.": True, "127.0.0.1": True,
    "127.1.2.3:80": True, "[::1]": True, "[::1]:16571": True, "": True, "chat.example": True, "chat.example:8443": True, "akashproxy": True,
    "b.example": False, "b.example:16571": False, "localhost.b.example": False, "127.0.0.1.b.example": False, "rebind.localhost.b.example": False,
    "192.168.1.2": False, "192.168.1.2:16571": False, "0.0.0.0": False, "[::2]:1": False, "[fe80::1]": False, "xlocalhost.": False,
    "localhost.b.example:localhost": False, "b.example:127.0.0.1": False, "a.chat.example": False, "chat.example.b.example": False,
    "127.0.0.256": False, "b.example.": False, "LocalHost.": True, "a.b.localhost:80": True, "127.255.0.9:1": True, "xlocalhost": True, "x": True,
    "CHAT.example:9": True, "x.y": False, "x.": False, "127.1": False, "127.0.0.1.x": False, "localhost.x": False, "10.0.0.1": False,
}


def test_hosts_of_a_loopback_server(serve):
    for token, changed in ((False, serve(public_url="https://chat.example:8443")), (True, serve(bearer_token=("k",)))):
        for host, served in HOSTS.items():
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/"), ("OPTIONS", "/status")):
                got = talk(changed, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nx-api-key: k\r\nContent-Length: 0\r\n"
                                    "Connection: close\r\n\r\n".encode())
                assert (b" 403 " not in got.split(b"\r\n")[0]) == (served or token), (host, got)
                assert served or token or b"PUBLIC_URL" in got and b"x-should-retry: false" in got


def test_a_server_on_all_interfaces_answers_to_any_name(serve):
    server = serve(server_address="0.0.0.0:0")
    assert ask(server, path="/v1/models", headers={"Host": "b.example"}).status == 200
    assert ask(server, path="/v1/models", headers={"Origin": "https://b.example"}).status == 403


@pytest.mark.parametrize("settings, kind", [({}, "public"), ({"bearer_token": ("k",)}, "private"),
                                            ({"keys": (akashproxy.ClientKeySettings(name="a", key="k"),)}, "private")])
def test_what_needs_a_token_is_not_for_shared_caches(settings, kind, akash, serve):
    server = serve(**settings)
    got = ask(server, path=f"/images/{akash.name}", headers={"x-api-key": "k"})
    assert (got.status, got.headers["cache-control"].split(",")[0]) == (200, kind)
    for path in ("/v1/models", "/status", "/metrics", "/", "/health"):
        assert "public" not in ask(server, path=path, headers={"x-api-key": "k"}).headers.get("cache-control", "")


NEEDED, WRONG = "is needed", "Incorrect API key provided"


@table({     # header fields: what is wrong with them; None if one of them is the token
    "Bearer": ({"Authorization": "Bearer k"}, None), "a tab": ({"Authorization": "Bearer\tk"}, None),
    "blanks": ({"Authorization": "bearer   k"}, None), "x-api-key": ({"x-api-key": "k"}, None), "Azure": ({"api-key": "k"}, None),
    "an empty Bearer": ({"Authorization": "Bearer ", "x-api-key": "k"}, None),
    "an empty field": ({"Authorization": "", "x-api-key": "k"}, None),
    "another scheme": ({"Authorization": "Basic azo=", "x-api-key": "k"}, None),
    "a wrong Bearer": ({"Authorization": "Bearer x", "x-api-key": "k"}, None),
    "a wrong key": ({"Authorization": "Bearer k", "x-api-key": "x"}, None),
    "three": ({"Authorization": "Bearer x", "x-api-key": "y", "api-key": "k"}, None),
    "all wrong": ({"Authorization": "Bearer wr0ng", "x-api-key": "y", "api-key": "z"}, WRONG),
    "no scheme": ({"Authorization": "k"}, NEEDED), "Basic": ({"Authorization": "Basic k"}, NEEDED),
    "a part": ({"x-api-key": ""}, NEEDED), "more": ({"Authorization": "Bearer k k"}, WRONG),
    "doubled": ({"Authorization": "Bearer Bearer k"}, WRONG), "not ASCII": ({"x-api-key": "\xe9"}, WRONG), "nothing": ({}, NEEDED),
    "only an empty Bearer": ({"Authorization": "Bearer "}, NEEDED),
})
def test_any_of_several_credentials_opens(headers, words, serve):
    for settings in ({"bearer_token": ("one", "k")}, {"keys": (akashproxy.ClientKeySettings(name="a", key="k"),)}):
        server = serve(**settings)
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/status"), ("GET", "/nowhere"), ("GET", "/images/x.png"),
                             ("DELETE", "/v1/models")):
            got = ask(server, method, path, CHAT if method == "POST" else None, headers)
            assert (got.status == 401) == bool(words), (path, got)
            if words:
                assert words in got.json["error"]["message"] and got.json["error"]["code"] == "invalid_api_key" and b"wr0ng" not in got.body
                assert got.json["code"] == 401 and got.json["data"]["msg"] and got.headers["www-authenticate"] == "Bearer"
                assert got.headers["x-should-retry"] == "false"
        assert ask(server, headers=headers).status == 200 and ask(server, "OPTIONS", "/v1/models").status == 204


# -- limits of keys


def read_models(request):
    """All models that some upstream could read in a request: in its query, its JSON without regard to case, its form."""
    found = [value for part in re.split("[&;]", request.path.partition("?")[2]) for name, _, value in [part.partition("=")]
             if "model" in urllib.parse.unquote(name).lower()]
    kind, text = request.headers.get("content-type", ""), request.body.decode("utf-8", "replace")
    charset = re.search(r"charset=\"?([\w-]+)", kind)
    for text in [text, request.body.decode(charset[1], "replace")] if charset else [text]:
        with contextlib.suppress(ValueError):
            json.loads(text, object_pairs_hook=lambda pairs: found.extend(
                value for name, value in pairs if name.casefold() == "model" and isinstance(value, str)))
    found += re.findall(r"""name\*?=["']?\s*model[^\n]*\n(?:[^\n]+\n)*\r?\n([^\r\n]*)""", text, re.I)
    return found


def multipart(*parts, end=b"--b--\r\n", before=b""):
    """A form of parts (head, value)."""
    return before + b"".join(b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n" for head, value in parts) + end


FILE = (b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b"RIFF\0\xff\r\n\r\nx")
MODEL = b'Content-Disposition: form-data; name="model"'
JSON, FORM, URLENCODED = "application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"
PROMPT = b'"messages":[{"role":"user","content":"hi"}],"input":"x"'


def calls_of(*bodies):
    return [b"{%b,%b}" % (body, PROMPT) for body in bodies]


AROUND = {  # (path, content type, further fields, bodies): all are refused, or the model `dear` is read by no upstream
    "case": ("/v1/chat/completions", JSON, {}, calls_of(
        b'"model":"cheap","Model":"dear"', b'"MODEL":"dear","model":"cheap"', b'"model":"cheap","mOdEl":"dear"', b'"model":"cheap","\\u004dodel":"dear"',
        b'"model":"cheap"," model":"dear"', b'"model":"cheap","model[]":"dear"', b'"model":"cheap","model\\u0000":"dear"')),
    "case, relayed": ("/v1/embeddings", JSON, {}, calls_of(b'"model":"cheap","Model":"dear"', b'"Model":"dear"', b'"model":"cheap","mode\\u004c":"dear"')),
    "twice": ("/v1/chat/completions", JSON, {}, calls_of(b'"model":"dear","model":"cheap"', b'"mod\\u0065l":"dear","model":"cheap"')),
    "twice, relayed": ("/v1/embeddings", JSON, {}, calls_of(b'"model":"dear","model":"cheap"', b'"mod\\u0065l":"dear","model":"cheap"')),
    "query": ("/v1/chat/completions?model=dear&x=1", JSON, {}, calls_of(b'"model":"cheap"')),
    "query, encoded": ("/v1/completions?x=1&%6dodel=dear&MODEL=dear;model=dear&model[]=dear&model%5B%5D=dear&+model=dear", JSON, {},
                       [b'{"model":"cheap","prompt":"x"}']),
    "query, relayed": ("/v1/embeddings?model=dear&model=dear", JSON, {}, calls_of(b'"model":"cheap"')),
    "charset": ("/v1/embeddings", JSON + "; charset=utf-7", {}, calls_of(b'"model":"cheap","+AG0AbwBkAGUAbA-":"dear"')),
    "escapes": ("/v1/embeddings", JSON + ';charset="unicode_escape"', {}, calls_of(b'"model":"cheap","\\\\u006dodel":"dear"')),
    "charset of a chat": ("/v1/chat/completions", JSON + "; charset=utf-7", {}, calls_of(b'"model":"cheap","+AG0AbwBkAGUAbA-":"dear"')),
    "compressed": ("/v1/embeddings", JSON, {"Content-Encoding": "gzip"}, calls_of(b'"model":"cheap"')),
    "another type": ("/v1/embeddings", "text/plain", {}, calls_of(b'"model":"dear"')),
    "no type": ("/v1/embeddings", "", {}, calls_of(b'"model":"dear"')),
    "a form's type": ("/v1/embeddings", URLENCODED, {}, calls_of(b'"model":"dear"', b'"model":"dear","model":"cheap"')),
    "a path": ("/v1/engines/dear/embeddings", JSON, {}, calls_of(b'"model":"cheap"')),
    "a path in capitals": ("/v1/Deployments/dear/embeddings", JSON, {}, calls_of(b'"model":"cheap"')),
    "multipart": ("/v1/audio/transcriptions", FORM, {}, [
        multipart(FILE, (MODEL, b"dear")), multipart((MODEL, b"cheap"), FILE, (MODEL, b"dear")), multipart((MODEL, b"dear"), (MODEL, b"cheap")),
        multipart((MODEL, b"cheap"), (MODEL.replace(b"model", b"Model"), b"dear")), multipart((MODEL, b"cheap"), (MODEL.replace(b'"', b""), b"dear")),
        multipart((MODEL + b'; filename="m"', b"dear")), multipart((MODEL + b'\r\nContent-Type: text/plain; charset=utf-7', b"dear")),
        multipart((MODEL + b'\r\nContent-Transfer-Encoding: base64', b"ZGVhcg==")), multipart((MODEL, b"cheap"), before=b"--b\n" + MODEL + b"\n\ndear\n"),
        multipart((MODEL, b"cheap"), end=b"--b--\r\n--b\r\n" + MODEL + b"\r\n\r\ndear\r\n--b--\r\n"), multipart((MODEL, b"cheap"), end=b""),
        multipart((b'Content-Disposition: form-data; name="x"', b"\n--b\n" + MODEL + b"\n\ndear"), (MODEL, b"cheap")),
        multipart((b'Content-Disposition: form-data; name="x"; name="model"', b"dear"), (MODEL, b"cheap")),
        multipart((b'Content-Disposition: form-data; name="x"\r\n' + MODEL, b"dear"), (MODEL, b"cheap")),
        multipart((b'Content-Disposition: form-data; name="x"; filename="y"; name="model"', b"dear"), (MODEL, b"cheap")),
        multipart((b"Content-Disposition: form-data;\r\n name=\"model\"", b"dear"), (MODEL, b"cheap")),
        multipart((b'Content-Disposition: form-data; name="_charset_"', b"utf-7"), (MODEL, b"cheap")),
        multipart((MODEL, b"dear"), before=b"preamble\r\n"), multipart((MODEL, b"cheap\r\ndear")), multipart((MODEL, b"cheap" + b" " * 999 + b"dear")),
        multipart(*[(MODEL.replace(b"model", b"x"), b"")] * 1000, (MODEL, b"dear")), multipart((MODEL + b"\r\nX: " + b"x" * 5000, b"dear")),
        multipart(FILE), b"", b"--b--\r\n", b"--b"]),
    "multipart, two boundaries": ("/v1/audio/transcriptions", FORM + "; boundary=c", {}, [multipart((MODEL, b"cheap"))]),
    "multipart, no boundary": ("/v1/audio/transcriptions", "multipart/form-data", {}, [multipart((MODEL, b"cheap"))]),
    "multipart, another kind": ("/v1/audio/transcriptions", "multipart/mixed; boundary=b", {}, [multipart((MODEL, b"dear"))]),
    "a form": ("/v1/audio/speech", URLENCODED, {}, [b"model=dear", b"model=cheap&model=dear", b"model=cheap&Model=dear", b"x=1;model=dear", b"%6Dodel=dear",
                                                  b"model[]=dear", b"model=%ff", b"model=\xff", b"x=1", b"model=cheap&_charset_=utf-7",
                                                  b"model=cheap" + b"&x=" * 1000, b"model=" + b"c" * 9999, b"x" * 9999 + b"=&model=dear"]),
}


@table(AROUND)
def test_no_way_around_the_models_of_a_key(path, kind, more, bodies, pool):
    fake = FakeOpenAI(models=["cheap", "dear"])
    server = known(pool(fake, keys=keys("alice", models=("cheap",)) + keys("bob")))
    asked = len(fake.requests)
    for body in bodies:
        headers = {**bearer("alice"), **more, **({"Content-Type": kind} if kind else {})}
        got = ask(server, "POST", path, body, headers)
        assert got.status in (200, 400, 404, 415), body
        read = [model for request in fake.requests[asked:] for model in read_models(request)]
        assert set(read) <= {"cheap"} and (got.status == 200 or "?" in path) == (asked < len(fake.requests)), (body, read)
        asked = len(fake.requests)
    assert ask(server, "POST", "/v1/embeddings", {"model": "dear", "input": "x"}, {**bearer("bob"), "Content-Type": JSON}).status == 200


def test_forms_of_a_key_with_models(pool):
    fake = FakeOpenAI(models=["cheap", "dear"])
    server = known(pool(fake, keys=keys("alice", models=("ch*",))))
    path = "/v1/audio/transcriptions"
    for kind, body in ((FORM, multipart(FILE, (MODEL, b"cheap"))), (FORM, multipart((MODEL, b"cheap"), FILE, end=b"--b--")),
                       ('multipart/form-data; boundary="b"', multipart((MODEL.replace(b'"', b""), b"cheap"), FILE)),
                       (FORM, multipart((MODEL + b"\r\nContent-Type: text/plain; charset=utf-8", b"cheap"), FILE)),
                       ("multipart/form-data;charset=UTF-8;boundary=b", multipart(FILE, (MODEL, b"cheap"))),
                       (FORM, multipart(FILE, (MODEL, b"cheap"), (MODEL.replace(b"model", b"language"), b"de"))),
                       (URLENCODED, b"model=cheap&input=a+b"), (URLENCODED, b"input=%C3%A9&model=ch%65ap")):
        got = ask(server, "POST", path, body, {**bearer("alice"), "Content-Type": kind})
        assert got.status == 200 and fake.requests[-1].body == body and fake.requests[-1].headers["content-type"] == kind
    large = multipart((FILE[0], bytes(8 << 20)), (MODEL, b"cheap"))
    assert ask(server, "POST", path, large, {**bearer("alice"), "Content-Type": FORM}).status == 200
    refused = ask(server, "POST", path, multipart(FILE, (MODEL, b"dear")), {**bearer("alice"), "Content-Type": FORM})
    assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")


def test_no_way_around_the_models_of_a_controller(pool):
    fake = FakeOpenAI(models=["cheap", "dear"])
    server = pool((fake, {"models": ["cheap", "ours"], "model_map": {"ours": "cheap"}}))
    for name in ("case", "case, relayed", "twice", "query", "query, encoded", "query, relayed", "charset", "escapes", "charset of a chat"):
        path, kind, more, bodies = AROUND[name]
        for body in bodies + [body.replace(b"cheap", b"ours") for body in bodies]:
            ask(server, "POST", path, body, {"Content-Type": kind, **more})
    assert {model for request in fake.requests for model in read_models(request)} == {"cheap"}


def test_json_with_a_forms_type_is_json(fake, pool):
    server = pool((fake, {"model_map": {"ours": "theirs"}}))
    ask(server, "POST", "/v1/embeddings", b' {"model":"ours","input":"x"}', {"Content-Type": URLENCODED})
    assert fake.bodies()[0]["model"] == "theirs" and fake.requests[-1].headers["content-type"] == JSON


@table({    # refuse_fields: (path, content type, body, status)
    "a fallback": ("/v1/chat/completions", JSON, calls_of(b'"model":"both","fallbacks":[{"model":"dear"}]')[0], 400),
    "another case": ("/v1/chat/completions", JSON, calls_of(b'"model":"both","Fallbacks":["dear"]')[0], 400),
    "escaped": ("/v1/embeddings", JSON, calls_of(b'"model":"both","f\\u0061llbacks":["dear"]')[0], 400),
    "translated": ("/v1/messages", JSON, calls_of(b'"model":"both","max_tokens":9,"models":["dear"]')[0], 400),
    "relayed": ("/v1/embeddings", JSON, calls_of(b'"model":"both","models":["dear"]')[0], 400),
    "in a form": ("/v1/audio/transcriptions", FORM, multipart(FILE, (MODEL.replace(b"model", b"models"), b"dear")), 400),
    "in a short form": ("/v1/audio/speech", URLENCODED, b"model=both&f%61llbacks=dear", 400),
    "as a list in a form": ("/v1/audio/transcriptions", FORM, multipart(FILE, (MODEL, b"both"), (MODEL.replace(b"model", b"models[]"), b"dear")), 400),
    "as an object in a short form": ("/v1/audio/speech", URLENCODED, b"model=both&fallbacks[0][model]=dear", 400),
    "in text": ("/v1/embeddings", "text/plain", calls_of(b'"model":"both","models":["dear"]')[0], 400),
    "in another charset": ("/v1/embeddings", JSON + "; charset=utf-7", calls_of(b'"model":"both"')[0], 415),
    "none": ("/v1/chat/completions", JSON, calls_of(b'"model":"both","n":2')[0], 200),
    "within another": ("/v1/embeddings", JSON, calls_of(b'"model":"both","metadata":{"models":1}')[0], 200),
    "a form without": ("/v1/audio/transcriptions", FORM, multipart(FILE, (MODEL, b"both")), 200),
})
def test_fields_that_a_key_must_not_send(path, kind, body, status, fake, pool):
    server = pool(fake, keys=keys("alice", refuse_fields=("fallbacks", "models")) + keys("bob"))
    got = ask(server, "POST", path, body, {**bearer("alice"), "Content-Type": kind})
    assert got.status == status and len(fake.bodies() if kind == JSON else fake.requests) == (status == 200), got.body
    assert ask(server, "POST", path, body, {**bearer("bob"), "Content-Type": kind}).status == 200


@table({"as it is": ("a=1&b=%20", "a=1&b=%20"), "alone": ("model=x", ""), "first": ("model=x&a=1", "a=1"), "last": ("a=1&model=x", "a=1"),
        "twice": ("model=x&a=1&MODEL=y", "a=1"), "encoded": ("%6d%4fdel=x&a=%26model=1", "a=%26model=1"), "semicolon": ("a=1;model=x", "a=1"),
        "no value": ("model&a", "a"), "others": ("models=1&model_id=2&xmodel=3", "models=1&model_id=2&xmodel=3"), "none": ("", "")})
def test_queries_without_a_model(query, left):
    assert akashproxy.remove_model_params(query) == left


def test_names_that_mean_the_model():
    for name in ("model", "Model", "MODEL", " model", "model ", "model[]", "model[0][x]", "model\0x", "mOdEl"):
        assert akashproxy.lenient_name(name) == "model", name
    for name in ("models", "model_id", "", "modell", "amodel", "[model]", "response_model"):
        assert akashproxy.lenient_name(name) != "model", name


def test_a_form_that_is_cut_or_has_one_more_byte_is_refused():
    complete = multipart((MODEL, b"cheap"), FILE, end=b"--b--")
    fields = akashproxy.multipart_fields(complete, FORM)
    assert fields == akashproxy.multipart_fields(complete + b"\r\n", FORM) and [field[:2] for field in fields] == [("model", "cheap"), ("file", "")]
    assert complete[fields[0].start:fields[0].end] == b"cheap"
    for at in range(len(complete)):
        with pytest.raises(APIError):
            akashproxy.multipart_fields(complete[:at], FORM)
    for more in (b"\n", b"\r", b"x", b"\r\n\r\n", b"\r\nx", b"\r\n--b\r\n"):
        with pytest.raises(APIError):
            akashproxy.multipart_fields(complete + more, FORM)


def test_a_form_costs_no_more_than_its_size():
    for unit in (b"--", b"\r\n--", b"\r\n--b", b"--b\r\n", b"\r\n\r\n", b"%41", b"&", b"=;", MODEL + b"\r\n"):
        for data in (unit * 200000, multipart((MODEL, unit * 200000), (MODEL, b"x")), multipart((unit * 200000, b""))):
            for fields in (akashproxy.urlencoded_fields, lambda data: akashproxy.multipart_fields(data, FORM)):
                start = time.thread_time()
                with contextlib.suppress(APIError):
                    fields(data)
                assert time.thread_time() - start < 2, unit


# == several processes and machines ===========================================================


def test_what_comes_on_an_idle_connection_of_a_server_that_stops_is_answered(akash, serve, monkeypatch):
    monkeypatch.setattr(akashproxy, "LAME_DUCK_SECONDS", 0.5)
    server = serve()
    with link_to(server) as used, link_to(server) as probe, link_to(server) as idle:
        assert [ask_again(link).status for link in (used, probe, idle)] == [200] * 3
        stopped = later(server.stop, 30)
        wait_for(lambda: server.socket.fileno() < 0)
        got = ask_again(used, "POST", "/v1/chat/completions", CHAT)
        assert (got.status, got.headers["connection"]) == (200, "close")
        got = ask_again(probe)
        assert (got.status, got.json["status"], got.headers["connection"]) == (503, "draining", "close")
        assert idle.sock.recv(1) == b"" and stopped.result() is None


def test_who_has_connected_to_a_server_that_stops_is_let_in(akash, serve):
    server, gate = serve(), threading.Event()
    server.loop.call_soon_threadsafe(lambda: gate.wait(10))         # it is slow
    with connect(server, post("/v1/chat/completions", CHAT)) as sock:
        stopped = later(server.stop, 30)
        wait_for(lambda: server.draining)
        gate.set()
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in answer
        stopped.result()


def saved(name):
    """The block of the README that is to be saved as a file of this name."""
    return re.search(rf"`{re.escape(name)}`(?:(?!```).)*?\n\n```\w+\n(.*?)^```$", README, re.M | re.S)[1]


def told(environ):
    """The settings that a block's variables make; each of them must be one."""
    assert set(environ) <= set(SETTINGS), environ
    return Settings.load({name: re.sub(r"\$\{\w+:\?.*\}", "t", value) for name, value in environ.items()})


FAREWELL = 2    # seconds that a stop may take beyond its grace
PORT = akashproxy.split_address(Settings().server_address)[1]
DEFAULTS = Settings()
DOCKERFILE = (HERE / "Dockerfile").read_text()


def test_the_composition_fits_the_code():
    services = pytest.importorskip("yaml").safe_load(saved("compose.yaml"))["services"]
    nginx = services.pop("nginx")
    for service in services.values():
        settings = told(service["environment"])
        assert settings.bearer_token and settings.server_address == DEFAULTS.server_address, "the Dockerfile says where to listen"
        assert settings.grace + FAREWELL < float(service["stop_grace_period"].rstrip("s"))
        assert service["ulimits"]["nofile"] > 2 * DEFAULTS.max_connections
        assert service["build"] == "." and service["read_only"] and not {"ports", "user", "healthcheck", "command"} & set(service)
    conf = saved("nginx.conf")
    assert re.findall(r"server ([\w-]+):(\d+) ", conf) == [(name, str(PORT)) for name in services]
    assert nginx["depends_on"] == list(services) and nginx["volumes"] == ["./nginx.conf:/etc/nginx/nginx.conf:ro"]
    assert nginx["ports"] == [f"{PORT}:{re.search(r'listen (.+?);', conf)[1]}"]


def test_the_nginx_conf_fits_the_code():
    for port in (PORT, PORT + 1):
        assert f"`SERVER_ADDRESS=127.0.0.1:{port} python3 akashproxy.py`" in README and f"`server 127.0.0.1:{port}`" in README
    conf = dict(re.findall(r"^ *(\w+) (.+?);", saved("nginx.conf"), re.M))
    hours = max(DEFAULTS.first_byte_timeout, DEFAULTS.image_timeout, DEFAULTS.idle_timeout, DEFAULTS.heartbeat) / 3600
    assert float(conf["proxy_read_timeout"].rstrip("h")) > hours and float(conf["proxy_send_timeout"].rstrip("h")) > hours
    assert conf["keepalive_timeout"] == "500ms" and akashproxy.LAME_DUCK_SECONDS >= 1 and DEFAULTS.keepalive_timeout >= 1
    assert conf["client_max_body_size"] == f"{DEFAULTS.max_body >> 20}m"
    passed_on = re.findall(r"location (?:= )?(\S+) \{[^}]*?proxy_next_upstream (.+?);", saved("nginx.conf"))
    assert passed_on == [("/", "error timeout"), ("/health", "error timeout http_503")], "a POST that was sent must not be repeated"
    assert "/health" in akashproxy.ROUTES
    assert (conf["proxy_buffering"], conf["proxy_http_version"]) == ("off", "1.1")
    passed_on = dict(re.findall(r"proxy_set_header (\S+) +(.+?);", saved("nginx.conf")))
    assert passed_on.items() >= {"Host": "$http_host", "X-Forwarded-Proto": "$scheme", "X-Forwarded-For": "$remote_addr"}.items()
    down = json.loads(re.search(r"'(\{.*\})'", saved("nginx.conf"))[1])
    assert list(down["error"]) == list(akashproxy.Dialect.error_body(APIError(502, "x"))["error"])


def test_the_kubernetes_manifests_fit_the_code():
    yaml = pytest.importorskip("yaml")
    deployment, service = yaml.safe_load_all(saved("kubernetes.yaml"))
    template = deployment["spec"]["template"]
    pod, container = template["spec"], template["spec"]["containers"][0]
    assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == service["spec"]["selector"]
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"USER {user}\n" in DOCKERFILE and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["ports"] == [{"name": "http", "containerPort": PORT}]
    assert service["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    secret = container["env"][1]["valueFrom"]["secretKeyRef"]
    assert f"the Secret `{secret['name']}` has the token as `{secret['key']}`" in README
    settings = told({item["name"]: item.get("value", "t") for item in container["env"]})
    stopping = settings.grace + FAREWELL
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] + stopping < pod["terminationGracePeriodSeconds"]
    for probe in container["readinessProbe"], container["livenessProbe"]:
        assert probe["httpGet"]["port"] == "http" and "GET" in akashproxy.ROUTES[probe["httpGet"]["path"]]
    alive = container["livenessProbe"]
    assert alive["periodSeconds"] * (alive["failureThreshold"] - 1) > stopping, "it must not kill one that stops"
    assert deployment["spec"]["replicas"] > 1 and f"kubectl autoscale deployment {deployment['metadata']['name']} --cpu-percent" in README
    assert "cpu" in container["resources"]["requests"], "the scaler counts in it"


def test_the_akash_deployment_fits_the_code():
    sdl = pytest.importorskip("yaml").safe_load(saved("deploy.yaml"))
    assert sdl["version"] == "2.0" and set(sdl) == {"version", "services", "profiles", "deployment"}
    for name, places in sdl["deployment"].items():
        for location, group in places.items():     # as Akash's own parser looks the names up
            assert group["profile"] in sdl["profiles"]["compute"] and group["count"] > 1
            assert group["profile"] in sdl["profiles"]["placement"][location]["pricing"]
        service, = [sdl["services"][name]]
        assert told(dict(line.split("=", 1) for line in service["env"])).bearer_token
        expose, = service["expose"]
        assert (expose["port"], expose["as"], expose["to"]) == (PORT, 80, [{"global": True}])
        options = expose["http_options"]
        assert 1000 * DEFAULTS.heartbeat < options["read_timeout"] <= 60000, "a ping must come first; no provider waits longer"
        assert options["max_body_size"] == DEFAULTS.max_body <= 104857600 and options["next_cases"] == ["error", "timeout"]
    kubernetes = next(pytest.importorskip("yaml").safe_load_all(saved("kubernetes.yaml")))
    assert service["image"] == kubernetes["spec"]["template"]["spec"]["containers"][0]["image"]


def test_the_systemd_unit_fits_the_code(tmp_path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    name = "/etc/systemd/system/akashproxy@.service"
    unit.read_string(saved(name))
    service = unit["Service"]
    settings = told(dict(word.split("=", 1) for word in service["Environment"].replace("%i", str(PORT)).split()))
    assert settings.server_address == f"127.0.0.1:{PORT}" and f"`server 127.0.0.1:{PORT}`" in README
    assert settings.grace + FAREWELL < float(service["TimeoutStopSec"])
    assert int(service["LimitNOFILE"]) > 2 * DEFAULTS.max_connections
    assert (service["ExecReload"], service["DynamicUser"]) == ("/bin/kill -HUP $MAINPID", "yes")
    command = service["ExecStart"].split()
    assert command[1:] == ["-I", "/opt/akashproxy/akashproxy.py"] and "/etc/akashproxy" in akashproxy.CONFIG_DIRECTORIES
    failed = run("--server-address", "nowhere")
    assert failed.returncode == int(service["RestartPreventExitStatus"])
    if shutil.which("systemd-analyze"):
        text = saved(name).replace(command[0], sys.executable).replace(command[2], str(HERE / "akashproxy.py"))
        (tmp_path / "akashproxy@.service").write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", f"./akashproxy@{PORT}.service"], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, [line for line in done.stderr.splitlines() if "akashproxy" in line]) == (0, [])


@contextlib.contextmanager
def nginx(folder, *replicas):
    """The README's nginx in front of replicas on these ports: its own port."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None and not os.environ.get("CI"):
        pytest.skip("no nginx here")
    port, conf = free_port(), saved("nginx.conf")
    for name, replica in zip(("akashproxy-1", "akashproxy-2"), replicas):
        conf = conf.replace(f"server {name}:{PORT} ", f"server 127.0.0.1:{replica} ")
    conf = conf.replace("listen 80;", f"listen 127.0.0.1:{port};")
    folders = "".join(f"{kind}_temp_path {kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(conf.replace("http {", "http { " + folders))
    directives = f"daemon off; pid {folder}/nginx.pid; error_log stderr;" + " user root;" * (os.geteuid() == 0)
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", directives],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: process.poll() is not None or not refused(port))
        assert process.poll() is None, "nginx does not take the README's conf"
        yield port
    finally:
        process.terminate()
        process.wait(20)


class Replicas:
    """Two replicas, each with an upstream of its own, behind the README's nginx at ``server_port``."""

    def __init__(self, stack, config, folder):
        self.stack, self.config = stack, config
        self.fakes = [FakeOpenAI(text=text) for text in ("From the first.", "From the second.")]
        self.texts = [fake.text for fake in self.fakes]
        self.hold = threading.Event()
        for fake in self.fakes:
            stack.callback(fake.close)
        self.running = [self.start(0), self.start(1)]
        self.server_port = stack.enter_context(nginx(folder, *(port for _, port in self.running)))

    def start(self, at, port=0):
        path = self.config({"controllers": [{"base_url": self.fakes[at].url + "/v1", "api_key": "k", "models": ["both"]}]})
        return self.stack.enter_context(started("--config-file", path, "--server-address", f"127.0.0.1:{port}", GRACE="30", LOG_LEVEL="warning"))

    def restart(self, at):
        self.running[at] = self.start(at, self.running[at][1])
        wait_for(lambda: self.say() == self.texts[at])

    def kill(self, at):
        self.running[at][0].kill()
        self.running[at][0].wait(20)

    def say(self):
        """What is answered: it tells by whom."""
        got = chat(self, BOTH)
        assert got.status == 200, got.body
        return text_of(got)

    def begin_stream(self):
        """A stream whose upstream keeps all but its first event until .hold is set: the answer, and who has it."""
        self.hold.clear()
        for fake in self.fakes:
            first, *rest = fake.events()
            fake.faulting(fake.steps(fake.head() + chunk(first), self.hold, chunks(*rest)))
        link = self.stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=20)))
        link.request("POST", "/v1/chat/completions", json.dumps({**BOTH, "stream": True}))
        answer = link.getresponse()
        assert b"From " in answer.read1(65536)
        idle, = [at for at, fake in enumerate(self.fakes) if fake.faults]
        self.fakes[idle].faults.clear()
        return answer, 1 - idle

    def keep_asking(self, stop, progress):
        while not stop.is_set():
            assert self.say() in self.texts and ask(self).status == 200
            assert sse(chat(self, BOTH, stream=True).body)
            progress.release()


def test_two_replicas_behind_nginx(config, tmp_path):
    """Streams come unbuffered; a killed replica costs only what it was doing, one that stops costs nothing."""
    with contextlib.ExitStack() as stack:
        replicas = Replicas(stack, config, tmp_path)
        answer, _ = replicas.begin_stream()
        replicas.hold.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")

        answer, killed = replicas.begin_stream()
        replicas.kill(killed)
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        replicas.hold.set()
        assert {replicas.say() for _ in range(4)} == {replicas.texts[1 - killed]}
        replicas.restart(killed)

        answer, stopped = replicas.begin_stream()
        stop, progress = threading.Event(), threading.Semaphore(0)
        with concurrent.futures.ThreadPoolExecutor(6) as threads, contextlib.ExitStack() as at_last:
            at_last.callback(stop.set)
            clients = [threads.submit(replicas.keep_asking, stop, progress) for _ in range(6)]
            for number in range(40):
                assert progress.acquire(timeout=20)
                if number == 20:
                    replicas.running[stopped][0].terminate()
            replicas.hold.set()
            assert answer.read().endswith(b"data: [DONE]\n\n") and replicas.running[stopped][0].wait(20) == 0
            replicas.restart(stopped)
            stop.set()
            assert [client.result() for client in clients] == [None] * 6, "not one request was lost"

        replicas.kill(0)
        replicas.kill(1)
        got = chat(replicas, BOTH)
        assert (got.status, got.json["error"]["code"]) == (502, "replica_down")


def table_rows(heading):
    """The cells of each row of the tables under a heading of the README."""
    section = re.search(rf"^##+ {heading}\n(.*?)^##", README, re.M | re.S)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]


def test_every_field_of_the_log_is_in_the_readme(log, serve):
    ask(serve(), path="/v1/models")
    wait_for(lambda: any(hasattr(record, "facts") for record in log.records))
    facts, = [record.facts for record in log.records if hasattr(record, "facts")]
    assert [name for first, *_ in table_rows("The log") for name in re.findall("`(.*?)`", first)] == list(facts)


def test_the_readmes_alerts_are_logged():
    found = [pair for first, *_ in table_rows("Alerts") for pair in re.findall(r"an? (warning|error) `(.*?)`", first)]
    for level, words in found:
        calls = r"log\.error|log\.exception|log_exhaustion" if level == "error" else r"log\.warning"
        assert re.search(rf'({calls})\([^)]*?{re.escape(words)}', SOURCE), words
    assert len(found) > 5


# == page =====================================================================================


class Browser:
    """Chromium without a window; a socket that is its descriptors 3 and 4 carries JSON, each message ended by NUL."""

    PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "about:blank"]
    KEYS = {"Enter": 13, "Escape": 27}

    def __init__(self, profile):
        self.sock, end = socket.socketpair()
        with end:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{end.fileno()} 4>&{end.fileno()}', "bash", self.PROGRAM, *self.FLAGS,
                 f"--user-data-dir={profile}"], pass_fds=[end.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.held, self.number = b"", 0

    def call(self, method, **params):
        """Send a command; its result."""
        self.number, self.end = self.number + 1, time.monotonic() + 20
        self.sock.sendall(json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def receive(self):
        while b"\0" not in self.held:
            self.sock.settimeout(max(0.01, self.end - time.monotonic()))
            data = self.sock.recv(1 << 20)
            assert data, "the browser has ended"
            self.held += data
        message, _, self.held = self.held.partition(b"\0")
        self.events.append(json.loads(message))
        return self.events[-1]

    def open(self, url, shown="#welcome button"):
        """Load a page in a new tab; wait until it shows something."""
        self.url = url.partition("#")[0]
        target = self.call("Target.createTarget", url="about:blank", **self.context)["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.load("Page.navigate", url=url)
        self.until(f"document.querySelector('{shown}')")

    def load(self, method, **params):
        self.call(method, **params)
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The value of an expression in the page."""
        got = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, script):
        """Wait until an expression is true; its value."""
        return self.run(f"new Promise((done) => (function look() {{ const it = {script}; it ? done(it) : setTimeout(look, 5); }})())")

    def press(self, key, modifiers=0):
        code = {"key": key, "code": key, "windowsVirtualKeyCode": self.KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": "\r"} if key == "Enter" else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text):
        """Type a text where the focus is, and Enter."""
        self.call("Input.insertText", text=text)
        self.press("Enter")

    def ask(self, text):
        """Send a message; the answer's element, once it has ended, is ``answer`` in the page."""
        self.until("document.querySelector('#welcome button')")
        self.run("window.before = document.querySelectorAll('.answer').length, document.getElementById('field').focus()")
        self.type(text)
        self.until("window.answer = document.querySelectorAll('.answer[aria-busy=false]')[before]")

    def examples(self):
        """The request for ``answer`` as curl and Python."""
        self.run("[...answer.querySelectorAll('details')].pop().open = true")
        return self.until("answer.querySelector('details:last-child pre') && Array.from(answer.querySelectorAll('details:last-child pre'),"
                          " (each) => each.textContent)")

    def choose(self, name):
        self.run("document.getElementById('picker').open || document.getElementById('model').click()")
        self.run(f"document.querySelector('#models [value={json.dumps(name)}]').click()")
        self.until(f"document.getElementById('model').innerText.includes({json.dumps(name)})")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def complaints(self):
        """What the page should not have done: errors, violations of its policy, dialogs, requests to others."""
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            entry = params.get("entry", {})
            if (method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
                    or entry.get("level") in ("warning", "error") and "Failed to load resource" not in entry["text"]
                    or method == "Network.requestWillBeSent" and not params["request"]["url"].startswith((self.url, "data:", f"blob:{self.url}"))):
                yield event

    def close(self):
        with self.sock, self.process:
            self.process.terminate()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not Browser.PROGRAM and not os.environ.get("CI"):
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(serve, pool, chromium):     # in this order, for the tab must be gone when its server stops
    chromium.session, chromium.events = {}, []
    chromium.context = chromium.call("Target.createBrowserContext")     # shares nothing with the others
    yield chromium
    chromium.session = {}
    chromium.call("Target.disposeBrowserContext", **chromium.context)
    assert not list(chromium.complaints())


def test_the_page_is_served_to_all_and_runs_only_its_own_script(serve):
    server = serve(bearer_token="secret")
    got = ask(server, path="/")
    assert (got.status, got.headers["content-type"], got.headers["cache-control"]) == (200, "text/html; charset=utf-8", "no-cache")
    policy = dict(part.split(" ", 1) for part in got.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", got.body.decode(), re.S)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy) and not re.search(rb"(?:src|import|fetch)\W{1,3}https?://\w|innerHTML", got.body)
    head = ask(server, "HEAD", "/")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(got.body)))
    assert ask(server, "POST", "/").status == 405
    left_out = serve(page="off", bearer_token="secret")
    assert ask(left_out, path="/").status == 404 and ask(left_out, path="/status").status == 401


def test_a_chat_on_the_page(browser, akash, serve):
    akash.chat = b'g:"Hm, a\\n"\ng:"greeting."\n' + HELLO
    browser.open(serve().url)
    columns = "new Set(Array.from(document.getElementById('welcome').children, (each) => each.getBoundingClientRect().x)).size"
    assert browser.run(columns) == 1, "what is first seen stands in one column"
    assert browser.run("(document.getElementById('model').click(), [...document.querySelectorAll('#models button')].map((each) => each.value))") == [
        "Meta-Llama-3-3-70B-Instruct", "Qwen/Qwen3", "AkashGen"]
    browser.choose("Meta-Llama-3-3-70B-Instruct")
    browser.run("document.getElementById('field').focus()")
    browser.call("Input.insertText", text="Hello,")
    browser.press("Enter", modifiers=8)     # Shift
    browser.ask("how are you?")
    assert browser.text(".question") == "Hello,\nhow are you?" and browser.text(".answer .text") == "Hello from the mock."
    assert browser.run("[answer.querySelector('details').open, answer.querySelector('.thoughts').textContent]") == [False, "Hm, a\ngreeting."]
    browser.choose("Qwen/Qwen3")
    browser.ask("And now?")
    first, second = akash.bodies()
    assert (first["model"], second["model"]) == ("Meta-Llama-3-3-70B-Instruct", "Qwen/Qwen3")
    assert [(message["role"], message["content"]) for message in second["messages"]] == [
        ("user", "Hello,\nhow are you?"), ("assistant", "Hello from the mock."), ("user", "And now?")]


MARKDOWN = {
    "a **b *c*** `d**`": "<p>a <strong>b <em>c</em></strong> <code>d**</code></p>",
    "``a ` b`` `c **d *e f": "<p><code>a ` b</code> `c **d *e f</p>",
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "snake_case_name 2*3*4 __b__ ***x*** ~~y~~ \\*z\\*": "<p>snake_case_name 2*3*4 <strong>b</strong> <strong><em>x</em></strong> <del>y</del> *z*</p>",
    "# A\n## B _c_\ntext": "<h2>A</h2><h3>B <em>c</em></h3><p>text</p>",
    "#### A\n# B\n## C": "<h2>A</h2><h2>B</h2><h3>C</h3>",
    "2. a\n   more\n3. b\n\n4. c": '<ol start="2"><li>a\nmore</li><li>b</li><li>c</li></ol>',
    "- a\n  - b\n    1. c\n- d": '<ul><li>a<ul><li>b<ol start="1"><li>c</li></ol></li></ul></li><li>d</li></ul>',
    "> a\n> > b\nc": "<blockquote><p>a</p><blockquote><p>b\nc</p></blockquote></blockquote>",
    "a\n\n---\n\n&amp;&#39;&x; <br>": "<p>a</p><hr><p>&amp;'&amp;x; <br></p>",
    "- [x] a": '<ul><li class="task"><input type="checkbox" disabled="" aria-label="done">a</li></ul>',
    "|a|b|\n|-|-:|\n|`c\\|d`|e|": '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table><thead><tr><th>a</th><th class="end">b</th></tr></thead>'
        '<tbody><tr><td><code>c|d</code></td><td class="end">e</td></tr></tbody></table></div>',
    "$\\frac{a}{2}$, $5 or $6": '<p><math><mrow><mfrac><mrow><mi>a</mi></mrow><mrow><mn>2</mn></mrow></mfrac></mrow></math>, $5 or $6</p>',
    "$x_i^2 \\le \\foo$": '<p><math><mrow><msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup><mo>≤</mo><mtext>\\foo</mtext></mrow></math></p>',
    "$$\\sum_{n} a,\\quad b$$": '<p><math class="block"><mrow><munder><mo>∑</mo><mrow><mi>n</mi></mrow></munder><mi>a</mi><mo>,</mo><mo>\u2003</mo>'
        '<mi>b</mi></mrow></math></p>',
    "[a `b`](https://x.example/c_(d)) or http://y.example/z.": '<p><a href="https://x.example/c_(d)" target="_blank" rel="noopener">'
        'a <code>b</code></a> or <a href="http://y.example/z" target="_blank" rel="noopener">http://y.example/z</a>.</p>',
    "[a](javascript:alert(1)) [b](data:text/html,x) [c](//x)": "<p>[a](javascript:alert(1)) [b](data:text/html,x) [c](//x)</p>",
    "![a](http://x.example/images/b.png)": '<p><a href="http://x.example/images/b.png" target="_blank" rel="noopener">a</a></p>',
}
LISTING = ('<figure><figcaption><span>%s</span><button type="button">Copy</button></figcaption>'
           '<pre tabindex="0"><code>%s</code></pre></figure>')
MARKDOWN.update({
    "a\n```py\nif a:\n\n    # b\n```\nc": "<p>a</p>" + LISTING % ("py", "if a:\n\n    # b") + "<p>c</p>",
    "```\n<b>": LISTING % ("", "&lt;b&gt;"),
    "- a\n  ~~~sh\n  b\n  ```\n  ~~~": '<ul><li>a' + LISTING % ("sh", "b\n```") + "</li></ul>",
})


def test_markdown_on_the_page(browser, fake, pool):
    browser.open(pool(fake).url)
    for fake.text, expected in MARKDOWN.items():
        browser.ask("?")
        built = browser.run("answer.querySelector('.text').innerHTML")
        assert re.sub(' (class=""|dir="[a-z]+")', "", built) == expected, fake.text


@pytest.mark.parametrize("part", ["`", "*", "_", "[", "**a *b", "``a `", "[a](https://", "\n", f"$x{'+ 10' * 9}$ ", f"- {'a' * 50}\n", "# a\n", "> ", "**`"],
                         ids=lambda part: part[:9].strip() or "lines")
def test_a_long_line_of_marks_is_drawn_at_once(part, browser, fake, pool):
    fake.events = lambda: [fake.event({"content": f"x {part * (100000 // len(part))}"}), fake.event({}, "stop")]
    browser.open(pool(fake).url)
    browser.call("Performance.enable", timeDomain="threadTicks")        # the thread's own time, whatever else the machine does
    browser.ask("?")
    metrics = {each["name"]: each["value"] for each in browser.call("Performance.getMetrics")["metrics"]}
    assert browser.run("answer.querySelector('.text').textContent.length") > 0 and metrics["TaskDuration"] < 5


@pytest.mark.parametrize("by", ["key", "button"])
def test_an_answer_that_is_stopped_half_way(by, browser, akash, serve):
    server = serve()
    akash.faults.append(akash.stall(b'0:"Once upon"\n'))
    browser.open(server.url)
    browser.type("Tell me a tale")
    browser.until("document.querySelector('.text')?.innerText === 'Once upon'")
    browser.press("Enter")      # nothing more is sent meanwhile
    if by == "key":
        browser.press("Escape")
    else:
        browser.run("document.getElementById('send').click()")
    browser.until("document.querySelector('.answer[aria-busy=false]')")
    wait_for(akash.gone.is_set)
    assert browser.text(".answer .bad") == "Stopped." and browser.text("#send") == "Send" and len(akash.bodies()) == 1
    browser.ask("Go on")
    assert [message["content"] for message in akash.bodies()[-1]["messages"]] == ["Tell me a tale", "Once upon", "Go on"]


def test_a_picture_on_the_page(browser, akash, serve):
    akash.chat = PICTURE_LINE
    akash.states.extend([{**QUEUE[0], "queue_position": 2}] * 100000)
    server = serve(bearer_token="secret")
    browser.open(server.url, shown="#token:focus")
    browser.type("secret")
    browser.until("document.querySelector('#welcome button')")
    browser.choose("AkashGen")
    browser.run("document.getElementById('field').focus()")
    browser.type("a red fox in the snow")
    browser.until("document.querySelector('.answer summary')?.textContent === 'The image is waiting, 2 before it.'")
    akash.states.clear()
    browser.until("document.querySelector('img')?.naturalWidth === 4")
    assert browser.run("document.querySelector('img').alt") == "A red fox in the snow"
    assert browser.run("document.querySelector('img').src").startswith(f"blob:{server.url}/")


def test_a_picture_that_is_not_one(browser, akash, serve):
    akash.chat = PICTURE_LINE
    akash.answers("/api/image/", akash.raw(reply(body=b"<svg xmlns='http://www.w3.org/2000/svg'/>", kind="image/svg+xml"), keep=True))
    browser.open(serve().url)
    browser.choose("AkashGen")
    browser.ask("a fox")
    browser.until("document.querySelector('.text .bad')?.innerText === 'This image can\\'t be shown.'")


def test_a_wrong_token_then_the_right_one(browser, akash, serve):
    browser.open(serve(bearer_token="r1ght").url, shown="#token:focus")
    assert browser.text("#trouble") == "This server needs a token. Type it above."
    browser.type("wr0ng")
    browser.until("document.getElementById('trouble').innerText.includes('is wrong')")
    assert browser.run("document.activeElement.id") == "token"
    browser.run("document.getElementById('token').select()")
    browser.type("r1ght")
    browser.until("document.activeElement.id === 'field'")
    browser.ask("Hello")
    assert browser.text("#trouble") == "" and browser.text(".answer .text") == "Hello from the mock."
    assert browser.run("[JSON.stringify(localStorage).includes('r1ght'), document.cookie, location.href.includes('r1ght')]") == [False, "", False]
    listings = browser.examples()
    assert len(listings) == 2 and "r1ght" not in str(listings)
    done = subprocess.run(["bash", "-c", listings[0]], env={**os.environ, "TOKEN": "r1ght"}, capture_output=True, timeout=20)
    assert read_chunks(sse(done.stdout))[0] == "Hello from the mock."
    assert akash.bodies()[0]["messages"] == akash.bodies()[1]["messages"]


def test_the_python_that_can_be_copied_works(browser, akash, serve):
    pytest.importorskip("openai")
    browser.open(serve().url)
    browser.ask("it's \"so\"")
    done = subprocess.run([sys.executable, "-c", browser.examples()[1]], capture_output=True, timeout=60)
    assert done.stdout == b"Hello from the mock." and akash.bodies()[0]["messages"] == akash.bodies()[1]["messages"]


def test_what_can_be_copied_is_quoted(browser, akash, serve):
    browser.open(serve().url)
    words = "it's $HOME `id` \"x\" \\ \u2028 é"
    browser.ask(words)
    curl, python = browser.examples()
    assert "Authorization" not in curl
    subprocess.run(["bash", "-c", curl], capture_output=True, timeout=20)
    assert [body["messages"][-1]["content"] for body in akash.bodies()] == [words, words]
    assert words in [node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)]
    browser.run("answer.querySelector('figure button').click()")
    browser.until("answer.querySelector('figure button').innerText !== 'Copy'")


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_html_in_names_prompts_and_answers_does_not_run(browser, pool):
    fake = FakeOpenAI([f"<b>m</b>{HOSTILE}"], f"{HOSTILE}\n\n# {HOSTILE}\n\n- {HOSTILE}\n\n```{HOSTILE}\n{HOSTILE}\n```\n\n"
                      f"[x](javascript:alert(3)) [{HOSTILE}](https://x.example/\"onclick=\"alert(4)) <javascript:alert(5)>")
    browser.open(pool(fake).url)
    browser.ask(HOSTILE)
    assert browser.text("#model") == f"<b>m</b>{HOSTILE}" and browser.text(".question") == HOSTILE
    assert browser.text(".text p") == browser.text(".text h2") == browser.text(".text li") == browser.text(".text code") == HOSTILE
    assert browser.run("document.querySelectorAll('main img, main script, main b, [onclick], [href^=javascript]').length") == 0
    fake.faults.append(fake.status(400, {"error": {"message": HOSTILE}}))
    browser.ask("again")
    assert HOSTILE in browser.text(".answer > .bad")
    browser.run("location.hash = '#status'")
    browser.until("document.querySelector('.card')?.innerText.includes('0 failed')")
    assert not browser.run("document.querySelector('.card .bad')"), "one client's words are not shown to others"


def test_errors_on_the_page_say_what_to_do(browser, fake, pool):
    server = pool(fake)
    browser.open(server.url)
    unknown = json.dumps({"error": {"message": "No such model.", "code": "model_not_found"}}).encode()
    for fault, words in ((fake.status(429, extra=b"Retry-After: 40\r\n"), "Try again in 40 s."),
                         (fake.status(404, unknown), "Choose another model."),
                         (fake.status(500), "Try again or choose another model."),
                         (fake.cut(1), "Try again or choose another model.")):
        end_cooldowns(server)
        fake.faults.append(fault)
        browser.run("document.getElementById('field').value = ''")
        browser.ask("Hello")
        assert browser.run("answer.querySelector('.bad').innerText").endswith(words)
    assert browser.run("[answer.querySelector('.text').innerText, document.getElementById('field').value]") == ["Hi ", ""]
    server.stop(0)
    browser.ask("Anyone?")
    assert browser.run("answer.querySelector('.bad').innerText") == "The server does not answer. Is it still running?"
    assert browser.run("[...answer.querySelectorAll('button')].some((each) => each.innerText === 'Try again')")


def test_the_page_reads_events_by_the_standard(browser, fake, pool):
    two_lines = fake.event({"content": "a"})[6:-2].replace(b', "model"', b',\r\ndata: "model"')
    events = (b": hello\r\n\r\nid: 1\r\nevent: message\r\ndata:" + two_lines + b"\r\n\r\n: ping\n\n"
              + fake.event({"content": "\u00e9\u65e5"}) + fake.event({}, "stop") + b"data: [DONE]\n\n")
    for size in (1, 7, len(events)):
        parts = [chunk(events[at:at + size]) for at in range(0, len(events), size)]
        fake.sends(fake.head() + b"".join(parts) + b"0\r\n\r\n")
    browser.open(pool(fake).url)
    for _ in range(3):
        browser.ask("Hello")
        assert browser.run("answer.querySelector('.text').innerText") == "a\u00e9\u65e5"


def test_the_controllers_on_the_page(browser, pool):
    one, two = FakeOpenAI(), FakeOpenAI(["other"])
    server = known(pool(one, two))
    browser.open(server.url + "#status", shown=".card:nth-of-type(2)")
    browser.until("document.querySelector('.card:nth-of-type(2)')?.innerText.includes('0 served')")
    two.faults.append(two.status(429, extra=b"Retry-After: 40\r\n"))
    chat(server, {**BOTH, "model": "other"})
    browser.until("/cooling down, \\d+ s[^]+\\b0 in flight · 0 served · 1 failed\\s+Last error: 429 rate limit/"
                  ".test(document.querySelector('.card:nth-of-type(2)').innerText)")
    browser.run("location.hash = '#chat'")
    browser.until("document.getElementById('form').checkVisibility() && !document.querySelector('.card')?.checkVisibility()")


def test_on_a_phone_enter_breaks_the_line(browser, fake, pool):
    browser.open(pool(fake).url)
    assert "Enter" in browser.text("#welcome .small")
    browser.call("Emulation.setDeviceMetricsOverride", width=320, height=600, deviceScaleFactor=1, mobile=True)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.load("Page.reload")
    browser.until("document.querySelector('#welcome button') && document.activeElement.id === 'field'")
    assert "Enter" not in browser.text("#welcome .small")
    browser.type("Hello")
    assert browser.run("[document.getElementById('field').value, document.querySelectorAll('.turn').length]") == ["Hello\n", 0]


def test_the_page_fits_a_phone(browser, pool):
    fake = FakeOpenAI(["a-model-with-a-" + "very-" * 20 + "long-name"], "x" * 300 + "\n```\n" + "y" * 300 + "\n```")
    browser.open(pool(fake).url)
    browser.call("Emulation.setDeviceMetricsOverride", width=320, height=600, deviceScaleFactor=1, mobile=True)
    browser.ask("z" * 300)
    assert browser.run("[innerWidth, document.documentElement.scrollWidth, document.getElementById('log').scrollWidth]") == [320] * 3


def test_chats_are_kept_renamed_and_deleted_with_undo(browser, pool):
    browser.open(pool(FakeOpenAI()).url)
    browser.ask("Hello")
    browser.run("document.getElementById('temperature').value = 0.5, document.getElementById('settings').onchange()")
    browser.load("Page.reload")
    assert browser.text(".question") == "Hello" and browser.run("document.getElementById('temperature').value") == "0.5"
    browser.run("document.getElementById('fresh').click(), document.getElementById('list').click()")
    assert browser.run("[document.querySelectorAll('#chats li').length, document.querySelectorAll('.question').length]") == [1, 0]
    browser.run("window.prompt = () => 'Greeting', document.querySelector('#chats [aria-label^=Rename]').click()")
    assert browser.text("#chats button") == "Greeting"
    browser.run("document.querySelector('#chats [aria-label^=Delete]').click()")
    assert browser.run("document.querySelectorAll('#chats li').length") == 0
    browser.run("document.querySelector('#note button').click(), document.getElementById('list').click()")
    assert browser.text("#chats button") == "Greeting" and browser.text(".question") == "Hello"


def test_chats_are_exported(browser, fake, pool):
    browser.open(pool(fake).url)
    browser.ask("Hello")
    browser.run("URL.createObjectURL = (blob) => { window.file = blob; return 'blob:' + location.href; };"
                "HTMLAnchorElement.prototype.click = function () { window.named = this.download; }")
    browser.run("document.getElementById('save').click()")
    chat, = json.loads(browser.run("file.text()"))
    assert browser.run("named") == "chats.json" and chat["title"] == "Hello"
    assert [message["content"] for message in chat["messages"]] == ["Hello", "Hi there."]


def test_a_question_is_edited(browser, fake, pool):
    browser.open(pool(fake).url)
    browser.ask("Hello")
    browser.ask("And now?")
    edit = "document.querySelector('.question + .tools button:last-child').click()"
    browser.run(edit)
    browser.run("document.querySelector('#note button').click()")
    assert browser.run("document.querySelectorAll('.turn').length") == 4, "undone"
    browser.run(edit)
    browser.ask(", world")
    assert browser.run("document.querySelectorAll('.turn').length") == 2
    assert [message["content"] for message in json.loads(fake.requests[-1].body)["messages"]] == ["Hello, world"]


@pytest.mark.parametrize("event", ["document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files}))",
                                   "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true}))"], ids=["paste", "drop"])
def test_settings_and_images_are_sent(event, browser, fake, pool):
    browser.open(pool(fake).url)
    browser.run("document.getElementById('system').value = 'Be brief.', document.getElementById('max_tokens').value = 5")
    browser.run("""new Promise((done) => document.createElement('canvas').toBlob((blob) => {
      const files = new DataTransfer();
      files.items.add(new File([blob], 'a.png', {type: 'image/png'}));
      done(EVENT);
    }))""".replace("EVENT", event))
    browser.until("document.querySelector('#images img')")
    browser.ask("What is it?")
    body = json.loads(fake.requests[-1].body)
    assert (body["max_tokens"], body["messages"][0]) == (5, system("Be brief."))
    assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert all("Be brief." in example and "max_tokens" in example for example in browser.examples())
    browser.run("document.querySelector('.question img').click()")
    assert browser.run("document.getElementById('viewer').open && document.querySelector('#viewer a').download") == "Attached image.png"


def test_models_are_searched(browser, pool):
    browser.open(pool(FakeOpenAI([f"family/model-{number}-chat" for number in range(80)])).url)
    browser.run("document.getElementById('model').click()")
    browser.until("document.activeElement.id === 'search'")
    browser.call("Input.insertText", text="chat 42")
    browser.until("document.querySelectorAll('#models button').length === 1")
    browser.press("Enter")
    browser.until("document.getElementById('model').innerText === 'family/model-42-chat'")


def test_a_failed_list_of_models_is_reported(browser, fake, pool):
    fake.answer = lambda sock, request: sock.sendall(reply(401, b'{"error": {"message": "no"}}')) or True
    browser.open(pool(fake).url, shown="#trouble")
    browser.until("document.getElementById('trouble').innerText.includes('key')")


def test_a_long_answer_in_small_parts_is_drawn_once(browser, fake, pool):
    fake.events = lambda: [*[fake.event({"content": "word " if number % 25 else "end.\n\n"}) for number in range(40000)], fake.event({}, "stop")]
    browser.open(pool(fake).url)
    browser.run("window.made = 0, new MutationObserver((changes) => { for (const {target, addedNodes} of changes)"
                " if (target.className === 'text') made += addedNodes.length; }).observe(document.body, {childList: true, subtree: true})")
    browser.ask("A tale")
    assert browser.run("answer.querySelector('.text').children.length") == 1601 and browser.run("made") < 4000


def test_the_line_under_an_answer_and_trying_again(browser, pool):
    one, two = FakeOpenAI(), FakeOpenAI()
    one.faults.append(one.status(429))
    browser.open(known(pool((one, {"weight": 9}), two)).url)
    browser.ask("Hello")
    assert re.match(r"b, after a=429 · \d\.\d+ s to first token", browser.text(".answer .line"))
    browser.run("answer.old = true, [...answer.querySelectorAll('button')].find((each) => each.innerText === 'Try again').click()")
    browser.until("document.querySelectorAll('.answer[aria-busy=false]').length === 1 && !document.querySelector('.answer').old")
    browser.run("document.querySelector('.question + .tools button:last-child').click()")
    assert browser.run("document.getElementById('field').value") == "Hello"


def axe_source():
    """The path of axe-core, where npm has it: AXE_CORE, or a global package."""
    npm = shutil.which("npm")
    roots = [subprocess.run([npm, "root", "-g"], capture_output=True, text=True, timeout=30).stdout.strip()] if npm else []
    paths = [os.environ.get("AXE_CORE", ""), *[os.path.join(root, "axe-core", "axe.min.js") for root in roots]]
    return next(filter(os.path.isfile, paths), None)


def test_axe_finds_nothing_on_the_page(browser, pool):
    path = axe_source()
    if path is None:
        pytest.skip("no axe-core here; AXE_CORE can be its path")
    fake = FakeOpenAI(text="### a\n- [x] b\n\n|a|b|\n|-|-|\n|c|$d$|\n\n```\ne\n```")
    browser.open(pool(fake).url)
    with open(path, encoding="utf-8") as file:
        browser.run(file.read() + ";0")
    states = ["", "document.getElementById('list').click()", "document.getElementById('settings').open = true",
              "document.getElementById('model').click()", "document.getElementById('picker').close(), location.hash = '#status'"]
    for at, state in enumerate(states):
        browser.run(f"{state};0")
        assert browser.run("axe.run().then(({violations}) => violations.map(({id}) => id))") == [], state
        if not at:
            browser.ask("Hello")


# == cost: everything takes a time in proportion to what it is given ==========================


PATTERN_METHODS = {"match", "fullmatch", "search", "findall", "finditer", "sub", "subn", "split"}
try:
    import re._parser as pattern_parser
except ImportError:             # before Python 3.11
    import sre_parse as pattern_parser


def item_samples(item):
    """Some short strings that an item of a parsed pattern matches."""
    kind, value = str(item[0]), item[1]
    if kind == "LITERAL":
        return [chr(value)]
    if kind == "IN":
        return class_samples(value)
    if kind == "BRANCH":
        return [sample(branch) for branch in value[1]]
    if kind in ("SUBPATTERN", "ATOMIC_GROUP"):
        return [sample(value[3] if kind == "SUBPATTERN" else value)]
    if kind.endswith("REPEAT"):
        return [sample(value[2]) * max(1, value[0])]
    return ["a" if value != ord("a") else "b"] if kind in ("ANY", "NOT_LITERAL") else [""]


def sample(items):
    return "".join(item_samples(item)[0] for item in items)


def class_samples(items):
    kinds = [(str(kind), value) for kind, value in items]
    named = {"LITERAL": lambda value: [chr(value)], "RANGE": lambda ends: list(map(chr, ends)),
             "CATEGORY": lambda name: [{"SPACE": " ", "DIGIT": "1"}.get(str(name).rpartition("_")[2], "a")]}
    found = list(dict.fromkeys(char for kind, value in kinds if kind in named for char in named[kind](value)))
    if kinds[0][0] == "NEGATE":
        return [next(char for char in 'a1 -."<' if char not in found)]
    return [found[0], *found[1:][-2:]]


def within(item):
    kind, value = str(item[0]), item[1]
    if kind == "BRANCH":
        return value[1]
    if kind == "SUBPATTERN":
        return [value[3]]
    if kind.startswith("ASSERT"):
        return [value[1]]
    return [value[2]] if kind.endswith("REPEAT") else [value] if kind == "ATOMIC_GROUP" else []


def parts_of(items, before=""):
    """(what leads to it, what may be repeated) for the items of a pattern, and for neighbours together."""
    literal = [str(kind) == "LITERAL" for kind, _ in items]
    edges = [at for at in range(len(items)) if not (at and literal[at] and literal[at - 1])] + [len(items)]
    for at, begin in enumerate(edges[:-1]):
        lead = before + sample(items[:begin])
        for unit in item_samples(items[begin]):
            yield lead, unit
        for end in {*edges[at + 1:at + 4], edges[-1]}:
            yield lead, sample(items[begin:end])
        for inner in within(items[begin]):
            yield from parts_of(inner, lead)


def pumps(pattern, flags):
    """(prefix, unit, suffix) from a pattern's own parts: prefix + many units + suffix may cost it more than their length."""
    parts = [(lead, unit) for lead, unit in dict.fromkeys(parts_of(pattern_parser.parse(pattern, flags))) if unit]
    units = sorted({unit for _, unit in parts}, key=lambda unit: (len(unit), unit))
    few = units[:6]
    pairs = [one + other for one in few for other in few if one != other] + [unit + "\n" for unit in units[-8:]]
    for lead, unit in dict.fromkeys([*parts, *[("", unit) for unit in (*units, *pairs)]]):
        for suffix in ("", "\0"):
            yield lead, unit, suffix


def costly(pattern, flags, method):
    """What makes a pattern cost more than in proportion to the text; None if nothing was found."""
    regex = re.compile(pattern, flags)
    call = getattr(regex, method) if method not in ("sub", "subn") else functools.partial(regex.sub, "")
    source = pattern if isinstance(pattern, str) else pattern.decode("latin-1")

    def search(text):
        result = call(text)
        if method == "finditer":
            collections.deque(result, maxlen=0)

    for lead, unit, suffix in pumps(source, flags):
        def pumped(size):
            text = lead + unit * max(1, size // len(unit)) + suffix
            return text if isinstance(pattern, str) else text.encode("latin-1", "replace")
        for times in range(12, 33, 4):      # an exponential one is noticed before it takes for ever
            if all(thread_seconds(search, pumped(times * len(unit))) > 0.02 for _ in range(3)):
                return lead, unit, suffix, times
        many = thread_seconds(search, pumped(5000))
        few = min(thread_seconds(search, pumped(1250)) for _ in range(3)) if many > 0.0004 else math.inf
        if many > max(12 * few, 0.1):
            return lead, unit, suffix, many / few
        # Where n costs a n + b n**2 and 5,000 cost less than 5 times as much as 1,250, 20,000 cost less than 8 times as much as 5,000.
        if many > 5 * few:
            # Always 5,000 and 20,000: between smaller sizes a bounded repetition may still grow as its square.
            steep = growth(search, lambda many: pumped(5000 * many), rounds=40, floor=1e-4)
            if steep > 8:
                return lead, unit, suffix, steep
    return None


def module_patterns(source, names):
    """(line, pattern, flags, method) of each pattern in a module's source: re.method(pattern ...), and compiled ones as used."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    used = collections.defaultdict(set)     # by the name of a compiled one
    for call in calls:
        if call.func.attr in PATTERN_METHODS:
            used[getattr(call.func.value, "attr", getattr(call.func.value, "id", ""))].add(call.func.attr)
    for call in calls:
        if ast.unparse(call.func.value) == "re" and call.func.attr != "escape":
            flags = [word.value for word in call.keywords if word.arg == "flags"]
            flags += [argument for argument in call.args if ast.unparse(argument).startswith("re.")]
            methods = [call.func.attr]
            if methods == ["compile"]:
                owner = call
                while not isinstance(owner, (ast.Assign, ast.AnnAssign)):
                    owner = parents[owner]
                target = owner.targets[0] if isinstance(owner, ast.Assign) else owner.target
                methods = sorted(used.get(getattr(target, "id", getattr(target, "attr", "")), {"search"}))
            for pattern in argument_values(call, parents, names):
                for method in methods:
                    yield call.lineno, pattern, int(eval(ast.unparse(flags[0]))) if flags else 0, method


class SampleLocals(dict):
    """A word for each local variable that a pattern is made with."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __missing__(self, name):
        if name in self.names or hasattr(builtins, name):
            raise KeyError(name)
        return "sample"


def argument_values(call, parents, names):
    """The values that a call's first argument can have: a literal's, a constant's, or those of a table that is gone through."""
    node = scope = call.args[0]
    if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
        return [eval(ast.unparse(node), names, SampleLocals(names))]
    while scope in parents:
        scope = parents[scope]
        if isinstance(node, ast.Attribute) and isinstance(scope, ast.ClassDef):
            owner = names[scope.name]
            rows = [entry for table in names.values() if isinstance(table, (list, tuple)) for entry in table if isinstance(entry, owner)]
            return [value for entry in rows or [owner] for value in [getattr(entry, node.attr)] if value]
        for loop in [*getattr(scope, "generators", []), *[scope] * isinstance(scope, ast.For)]:
            if ast.unparse(node) in ast.unparse(loop.target):
                return eval(f"[{node.id} for {ast.unparse(loop.target)} in {ast.unparse(loop.iter)}]", names)
    return [names[node.id]]         # KeyError: say here where such a pattern comes from


def script_patterns(script):
    """(line, pattern, flags, method) of the expressions in JavaScript, in Python's spelling."""
    literals = re.findall(r"(?<=[(\[,=] )/((?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+)/([a-z]*)|"
                          r"(?<=[(\[])/((?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+)/([a-z]*)", script)
    found = [(one + two, flags + others) for one, flags, two, others in literals]
    if shutil.which("node"):        # those that are put together from others, too
        markdown = re.search(r"^// -- Markdown.*?^// -- ", script, re.S | re.M)[0]
        tables = "console.log(JSON.stringify([BLOCKS, SPANS].flatMap(Object.values).map(([{source}]) => source)))"
        output = subprocess.run(["node", "-e", markdown + "\n" + tables], capture_output=True, check=True, timeout=60).stdout
        found += [(source, "gm") for source in json.loads(output)]
    for source, flags in found:
        pattern = (source.replace("(?<name", "(?P<name").replace("[^]", r"[\s\S]").replace(r"\/", "/"))
        pattern = re.sub(r"\(\?<(?=\w)", "(?P<", re.sub(r"\\k<(\w+)>", r"(?P=\1)", pattern))
        yield source, pattern, re.M * ("m" in flags) | re.S * ("s" in flags), "finditer"      # a list of matches would cost more than they


@pytest.fixture
def abort():
    """Ends what takes more than a minute of CPU: re looks for signals while it searches."""
    def stop(*_):
        raise AssertionError("it takes for ever")
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("part", range(4))
def test_every_pattern_of_the_module_is_linear(part, abort):
    found = list(dict.fromkeys(module_patterns(SOURCE, vars(akashproxy))))
    assert len(found) > 50
    for line, pattern, flags, method in found[part::4]:
        assert not (cause := costly(pattern, flags, method)), (line, pattern, method, cause)


def test_every_pattern_of_the_page_is_linear(abort):
    found = list(script_patterns(akashproxy.PAGE.partition("<script")[2]))
    assert len(found) > 12
    for line, pattern, flags, method in found:
        assert not (cause := costly(pattern, flags, method)), (line, cause)


@pytest.mark.parametrize("call", [
    're.match("(a?b+)+x", text)', 're.fullmatch(r"([0-9]{1,14}(\\.[0-9]+)?(ms|[smhd]?))+", text)', 're.match("(a|a|ab)*c", text)',
    're.findall(r"\\s*\\S+", text)', 're.search(rf"{WORD}:", text)', 're.search("model .* does not exist", text)',
    '[re.search(word, text) for word, _ in WORDS]',
    'LINE = re.compile(r"^<a b=\'(.*)\'>$", re.S | re.M); LINE.search(text)',
])
def test_a_pattern_that_is_not_linear_is_found(call, abort):
    names = {"WORD": "[a-z]+", "WORDS": [("a", 1), ("[a-z]+://", 2)]}
    assert any(costly(pattern, flags, method) for _, pattern, flags, method in module_patterns(call, names))


def feeding(make, as_fed=lambda item: item):
    """A component with feed(): the work of some items."""
    def work(items):
        component = make()
        for item in items:
            component.feed(as_fed(item))
    return work


texts = functools.partial(feeding, as_fed=lambda text: [Text(text)])


def received(items):
    request = types.SimpleNamespace(scope=akashproxy.CancelScope(), method="POST", timeouts=None)
    response = akashproxy.UpstreamResponse(None, request, False, None)
    for item in items:
        if not response.status:
            response.receive(item)


def said(dialect, body):
    """A stream of events in a client's format."""
    def work(events):
        answer = dialect({"model": "m", "stream": True, **body})
        answer.opening_frames()
        for event in events:
            answer.encode([event])
        answer.encode([Finish("stop")])
    return work


CHAT_BODY = {"messages": [user("hi")], "max_tokens": 9}
chunked_body = functools.partial(BodyDecoder, {"transfer-encoding": "chunked"})
relay_decoder = functools.partial(akashproxy.PassthroughDecoder, "b", akashproxy.CHAT_END)
tool_filter = lambda: akashproxy.ToolCallFilter(prompted(stream=False))
stops_filter = functools.partial(StopFilter, ["x" * 499 + "y", "ab" * 250 + "c", "x" * 20], None)


def chat_line(delta):
    return b"data: %b\n\n" % json.dumps({"choices": [{"delta": delta}]}).encode()


def relayed_in(line):
    """The CPU seconds that a decoder takes for many lines, none of which is the first content of its stream."""
    decoder = relay_decoder()
    seconds = thread_seconds(decoder.feed, line * 8000)
    assert not decoder.started
    return seconds


@pytest.mark.parametrize("blank", [b"data:\n", b"data: \n", b"data:\r\n", b"data:   \t\n"])
def test_data_lines_without_data_cost_less_than_events(blank):
    assert min(relayed_in(blank) for _ in range(3)) < min(relayed_in(b'data: {"choices":[]}\n') for _ in range(3)) / 2


def thread_seconds(work, items):
    """CPU time of this thread, without garbage collections: one goes through all objects of all tests, after some allocations."""
    gc.disable()
    began = time.thread_time()
    try:
        work(items)
        return time.thread_time() - began
    finally:
        gc.enable()


def growth(work, sizes, rounds=10, floor=1e-3):
    """How much more four times as much costs, at best of a few, in CPU time of this thread; ``sizes(n)`` gives the items."""
    least = {1: math.inf, 4: math.inf}
    for number in range(rounds):
        for many in (1, 4, 1):      # the small one twice: inflated by a busy machine, it would make a steep cost look like a linear one
            least[many] = min(least[many], thread_seconds(work, sizes(many)))
        times = least[4] / max(least[1], floor)
        if times < 6 or times > 12 and (least[4] > 0.05 or number > 9):     # linear is 4, a square 16; noise makes no long time
            break                                                           # three times as long, nor a short one ten times over
    return times


def growths(work, head, unit, tail):
    size = len(unit)
    yield "whole", growth(work, lambda many: [head + unit * (many * 20000 // size) + tail])
    yield "in single pieces", growth(work, lambda many: split(head + unit * (many * 10000 // size) + tail, 1))
    yield "in units", growth(work, lambda many: [head, *[unit] * (many * 2000), tail])


# name: (work, head, unit, tail): the work of head + many units + tail, at once, in single pieces and in many of them
@table({
    "Akash: texts": (feeding(AkashDecoder), b"", b'0:"a"\n', b""),
    "Akash: texts and thoughts in turn": (feeding(AkashDecoder), b"", b'0:"a"\ng:"b"\n', b""),
    "Akash: texts and blank lines in turn": (feeding(AkashDecoder), b"", b'0:"a"\n\n', b""),
    "Akash: a broken text at the end": (feeding(AkashDecoder), b"", b'0:"a"\n', b'0:"b\n'),
    "Akash: calls of tools": (feeding(AkashDecoder), b"", b"9:{}\n", b""),
    "Akash: a line without an end": (feeding(AkashDecoder), b'0:"', b"xyzxyzxyz", b""),
    "Akash: events": (feeding(AkashDecoder), b"", b'data: {"type":"text-delta","delta":"a"}\n\n', b""),
    "Akash: comments": (feeding(AkashDecoder), b"", b": hi\n", b""),
    "Akash: halves of a pair": (feeding(AkashDecoder), b"", b'0:"\\ud83d"\n', b""),
    "Chat: texts": (feeding(akashproxy.ChatDecoder), b"", chat_line({"content": "a"}), b""),
    "Chat: data lines alone": (feeding(akashproxy.ChatDecoder), b"", b"data:\n", b""),
    "Chat: data lines with CR": (feeding(akashproxy.ChatDecoder), b"", b"data: x\r\n", b""),
    "Chat: comments": (feeding(akashproxy.ChatDecoder), b"", b": hi\n\n", b""),
    "Chat: a line without an end": (feeding(akashproxy.ChatDecoder), b"data: ", b"xyzxyzxyz", b""),
    "Chat: one call of a tool in fragments": (feeding(akashproxy.ChatDecoder), b"", chat_line({"tool_calls": [{"index": 0}]}), b""),
    "Relay: comments before an event": (feeding(relay_decoder), b"", b": hi\n", b""),
    "Relay: blank lines before an event": (feeding(relay_decoder), b"", b"\n", b""),
    "Relay: a line without an end": (feeding(relay_decoder), b"data: ", b"xyzxyzxyz", b""),
    "Relay: events": (feeding(relay_decoder), b"", chat_line({"content": "a"}), b""),
    "Relay: half an event, comments after it": (feeding(relay_decoder), b"data: {}\n", b": finish_reason\n", b""),
    "Relay: words of an end": (feeding(relay_decoder), chat_line({}), b'data: "finish_reason":"[DONE] response.\n', b""),
    "Relay: types of an end within events": (feeding(functools.partial(akashproxy.PassthroughDecoder, "b", akashproxy.STREAM_ENDS["/v1/messages"])), b"data: 1\n",
                                             b'data: {"a":[{"type":"message_stop"},{"type":"error"},{"type":"message_stop"}],"type":"ping"}\n', b""),
    "Relay: types of an end within an event": (feeding(functools.partial(akashproxy.PassthroughDecoder, "b", akashproxy.STREAM_ENDS["/v1/messages"])), b'data: 1\ndata: [0',
                                               b',{"type":"message_stop"},{"type":"error"}', b"]\n"),
    "Body: small chunks": (feeding(chunked_body), b"", b"1\r\na\r\n", b""),
    "Body: chunks with extensions": (feeding(chunked_body), b"", b"1;a\r\na\r\n", b""),
    "Body: chunks with line breaks in them": (feeding(chunked_body), b"", b"2\r\n\r\n\r\n", b""),
    "Body: half a chunk": (feeding(chunked_body), b"fffff\r\n", b"xyz", b""),
    "Thinking: line breaks in a thought": (texts(ThinkTagFilter), "<think>a", "\n", "b"),
    "Thinking: a thought": (texts(ThinkTagFilter), "<think>", "word <b> \n", ""),
    "Thinking: blanks before the answer": (texts(ThinkTagFilter), "", " ", ""),
    "Thinking: beginnings of a tag": (texts(ThinkTagFilter), "a", "</think", ""),
    "Thinking: tags": (texts(ThinkTagFilter), "<think>", "</think>", ""),
    "Base64: blanks": (lambda items: [akashproxy.decode_base64(item + "AAAA", "x") for item in items], "", " \n", ""),
    "Cutoff: beginnings of a stop": (texts(stops_filter), "", "xxxxxxxxxxxxxxxxxx\0", ""),
    "Cutoff: a long stop that nearly comes": (texts(stops_filter), "", "ababab", ""),
    "Cutoff: a text without a stop": (texts(stops_filter), "", "some words\n", ""),
    "Cutoff: a stop as long as the text": (texts(lambda: StopFilter(["x" * akashproxy.MAX_STOP_LENGTH], None)), "", "x", ""),
    "Tools: beginnings of marks": (texts(tool_filter), "", "[TOOL <tool_cal", ""),
    "Tools: a mark in prose": (texts(tool_filter), "", "<tool_call> is ", ""),
    "Tools: marks only": (texts(tool_filter), "", "<tool_call>", ""),
    "Tools: backticks": (texts(tool_filter), "", "`", ""),
    "Tools: a long argument": (texts(tool_filter), '<tool_call>{"name": "write", "arguments": {"content": "', 'word \\n ', '"}}</tool_call>'),
    "Tools: words, not JSON": (texts(tool_filter), "<tool_call>{", "word", ""),
    "Tools: brackets": (texts(tool_filter), "<tool_call>", "[", ""),
    "Tools: parameters": (texts(tool_filter), "<function=write>\n<parameter=content>\n", "</parameter>\n", ""),
    "Tools: a list of calls": (texts(tool_filter), "<tool_call>[", '{"name": "now"},', "]</tool_call>"),
    "Collected": (feeding(lambda: akashproxy.BufferedBody(lambda data: [])), b"", b"ab", b""),
})
def test_a_decoder_takes_a_time_in_proportion_to_its_input(work, head, unit, tail):
    for form, times in growths(work, head, unit, tail):
        assert times < 8, f"{form}: four times as much costs {times:.1f} times as much"


def call_of(index, arguments="{}"):
    return ToolCall(index, arguments, f"id{index}", "f")


# name: (work, n -> items)
@table({
    "fold: fragments of one call": (fold, lambda n: [call_of(0, "x" * 40)] * n),
    "fold: calls whose numbers have one hash": (fold, lambda n: [call_of(at * (2**61 - 1)) for at in range(n)]),
    "fold: texts": (fold, lambda n: [Text("a"), Reasoning("b")] * n),
    **{f"{dialect.__name__}: {name}": (said(dialect, body), make)
       for dialect, body in ((akashproxy.Messages, CHAT_BODY), (akashproxy.Responses, {"input": "hi"}), (akashproxy.ChatCompletions, CHAT_BODY))
       for name, make in {
           "calls of tools": lambda n: list(map(call_of, range(n))),
           "calls that wait": lambda n: [call_of(0, "{"), *map(call_of, range(1, n))],
           "fragments in turn": lambda n: [call_of(at % 50, "x") for at in range(n)],
           "blanks after a call": lambda n: [call_of(0), call_of(1, json.dumps("x" * n)), *[ToolCall(0, " ")] * n],
           "texts and calls in turn": lambda n: [event for at in range(n // 2) for event in (Text("a"), call_of(at))],
           "texts and thoughts in turn": lambda n: [Text("a"), Reasoning("b")] * (n // 2),
       }.items()},
    "Chat: calls in one event": (feeding(akashproxy.ChatDecoder), lambda n: [chat_line({"tool_calls": [{"index": at} for at in range(n)]})]),
    "Chat: calls with ids in one event": (feeding(akashproxy.ChatDecoder), lambda n: [chat_line({"tool_calls": [
        {"index": 0, "id": f"call{at}"} for at in range(n)]})]),
    "Chat: calls one by one": (feeding(akashproxy.ChatDecoder), lambda n: [chat_line({"tool_calls": [{"index": at}]}) for at in range(n)]),
    "Chat: calls whose numbers have one hash": (feeding(akashproxy.ChatDecoder), lambda n: [
        chat_line({"tool_calls": [{"index": at * (2**61 - 1)}]}) for at in range(n)]),
    "Chat: choices": (feeding(akashproxy.ChatDecoder), lambda n: [b'data: {"choices":[%b{}]}\n\n' % (b"{}," * n)]),
    "tools as text: allowed tools": (lambda tools: prompted(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": {"tools": tools[::-1]}}),
                                     lambda n: [{"type": "function", "function": {"name": f"f{at}"}} for at in range(n)]),
    "Messages: messages of the system": (lambda messages: akashproxy.Messages({"model": "m", "max_tokens": 1, "messages": messages}),
                                         lambda n: [system("a" * 90)] * n),
    "Responses: messages of the system": (lambda items: akashproxy.Responses({"model": "m", "input": items}),
                                          lambda n: [{"role": "developer", "content": "a" * 90}] * n),
    "Akash: a request of many messages": (lambda messages: akashproxy.akash_request("m", {"messages": messages}),
                                          lambda n: [user("a")] * n),
    "Akash: models": (akashproxy.akash_models, lambda n: [{"id": f"model{at}"} for at in range(n)]),
    "Akash: lines like a picture's": (lambda lines: akashproxy.parse_image_job(b"".join(lines)), lambda n: [
        b"0:\"<image_generation> jobId='' prompt='\n"] * n),
    "Akash: ends like a picture's": (lambda lines: akashproxy.parse_image_job(b"".join(lines)), lambda n: [
        b"0:\"<image_generation> jobId='' prompt='\n", *[b"'</image_generation>\"\n"] * n]),
    "a head with a long line, byte by byte": (received, lambda n: [b"HTTP/1.1 200 OK\r\nx: ", *[b"x"] * (n * 15 // 2)]),
    "a head with many lines, byte by byte": (received, lambda n: [b"HTTP/1.1 200 OK\r\n", *[b"x", b":", b"\r", b"\n"] * (n * 15 // 8)]),
    "Akash: blanks in an error": (lambda parts: akashproxy.akash_error("".join(parts), "m"), lambda n: ["model a "] * n),
    "the span of a limit": (lambda parts: akashproxy.total_seconds("".join(parts)), lambda n: ["1m30.5s"] * n),
})
def test_many_items_take_a_time_in_proportion_to_their_number(work, make):
    times = growth(work, lambda many: make(many * 2000))
    assert times < 8, f"four times as many cost {times:.1f} times as much"


class Rejoining:
    """A component as it must not be: what it holds is gone through again with each piece."""

    held = b""

    def feed(self, data):
        self.held = (self.held + data).swapcase().rpartition(b"\n")[2]     # swapcase(): so that joining costs more than the call


def test_a_cost_that_is_not_in_proportion_is_found():
    assert any(times > 8 for _, times in growths(feeding(Rejoining), b"", b"xyz", b""))
    assert growth(lambda items: [items.index(item) for item in items], lambda many: list(range(many * 1000))) > 8


def test_what_an_upstream_sends_without_an_end_is_bounded():
    for decoder, unit, limit in ((akashproxy.ChatDecoder("b"), b"data:\n", 20 << 20), (akashproxy.ChatDecoder("b"), b"x", 20 << 20),
                                 (relay_decoder(), b": hi\n", 20 << 20), (relay_decoder(), b"x", 20 << 20), (AkashDecoder(), b"x", 20 << 20)):
        data, fed = unit * (100000 // len(unit)), 0
        tracemalloc.start()
        while not decoder.error:
            decoder.feed(data)
            fed += len(data)
            assert fed < limit
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert decoder.error.status == 502 and "too long" in decoder.error.message and peak < 50 << 20, (type(decoder), unit)


def test_calls_of_tools_are_bounded():
    akash, chat = AkashDecoder(), akashproxy.ChatDecoder("b")
    events = akash.feed(b"9:{}\n" * (akashproxy.MAX_TOOL_CALLS + 1))
    assert len(events) == akashproxy.MAX_TOOL_CALLS and "tool calls" in akash.error.message
    calls = [{"index": at, "id": str(at), "function": {"name": "f"}} for at in range(akashproxy.MAX_TOOL_CALLS)]
    assert len(chat.feed(chat_line({"tool_calls": calls}))) == akashproxy.MAX_TOOL_CALLS and not chat.error
    chat.feed(chat_line({"tool_calls": [{"index": akashproxy.MAX_TOOL_CALLS, "function": {"name": "f"}}]}))
    assert chat.error.status == 502 and "tool calls" in chat.error.message


def test_odd_numbers_and_ids_of_calls_are_read():
    decoder = akashproxy.ChatDecoder("b")
    for index, id, expected in ((-1, "a", 0), (2**61, "b", 1), (None, {}, 1), (0, 7, 2), (0, [], 2)):
        event, = decoder.feed(chat_line({"tool_calls": [{"index": index, "id": id, "function": {"name": "f", "arguments": "x"}}]}))
        assert event.index == expected and event.id in (None, "a", "b", "7")


@pytest.mark.parametrize("text, seconds", [
    ("17", 17), ("1m30.5s", 90.5), ("6h", 21600), ("120ms", 0.12), ("1d", 86400), ("1m30", 90), ("1.51.5", None), ("1m5.", None),
    ("", None), ("1" * 40 + "x", None), ("1" * 60000, None), ("1m" * 30000 + "x", None), ("5x", None), ("-1", None),
])
def test_a_span_is_read_or_it_is_none(text, seconds):
    assert akashproxy.seconds_from_now(text) == (None if seconds is None else pytest.approx(seconds))


def test_bytes_of_a_head_cost_no_more_the_longer_it_is(serve):
    server = serve()

    def cost(size):
        with crowd(server, 40, b"") as clients:
            durations = []
            for data in (b"GET /" + b"x" * size, *[b"x"] * 8):
                began = time.process_time()
                for client in clients:
                    client.sendall(data)
                assert ask(server, "GET", "/health").status == 200      # by then they have been read
                durations.append(time.process_time() - began)
            return sum(durations[1:])

    short, long = cost(10), cost(60000)
    assert long < 4 * short + 0.05, (short, long)


# == http.server as its users know it =========================================================


class OwnHandler(akashproxy.Handler):
    SHORT = {"/parts": (200, {}, [b"one ", b"two"]), "/unmodified": (304, {}, []), "/last": (200, {"Connection": "close"}, [])}

    def do_GET(self):
        if self.path == "/mine":
            data = f"{self.command} {self.headers['User-Agent']} {self.headers.get('x-NONE', 'none')} {self.client_address[0]}".encode()
            self.send_response(203)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        elif self.path in self.SHORT:
            status, fields, parts = self.SHORT[self.path]
            self.send_response(status)
            for field in fields.items():
                self.send_header(*field)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)
        elif self.path == "/error":
            self.send_error(418, "I am a teapot", "tea only")
        elif self.path == "/split":
            self.send_response(200)
            self.send_header("X-Evil", "a\r\nB: c")
        elif self.path == "/cookies":
            self.send_response_only(200)
            for value in ("a=1", "b=2"):
                self.send_header("Set-Cookie", value)
            self.end_headers()
        elif self.path == "/target%?a=%41":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{self.requestline} {self.close_connection}".encode())
        elif self.path == "/nothing":
            return None
        elif self.path == "/bug":
            raise KeyError("a bug")
        else:
            return super().do_GET()

    do_HEAD = do_GET

    def do_POST(self):
        if self.path != "/upper":
            return super().do_POST()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.rfile.read().upper())


@table({
    "a length": ("GET", "/mine", None, 203, b"GET tests none 127.0.0.1"),
    "only the head": ("HEAD", "/mine", None, 203, b""),
    "chunks": ("GET", "/parts", None, 200, b"one two"),
    "a body": ("POST", "/upper", b"abc", 200, b"ABC"),
    "the module's own": ("GET", "/health", None, 200, None),
    "the module's own 404": ("GET", "/elsewhere", None, 404, None),
    "a target with a query": ("GET", "/target%25?a=%41", None, 200, b"GET /target%?a=%41 HTTP/1.1 False"),
    "send_error": ("GET", "/error", None, 418, None),
    "a line break in a header": ("GET", "/split", None, 500, None),
    "no response": ("GET", "/nothing", None, 500, None),
    "a bug": ("GET", "/bug", None, 500, None),
})
def test_a_handler_as_of_http_server(method, path, body, status, expected, akash):
    server = Server(Settings(server_address="127.0.0.1:0", akash_base_url=akash.url), OwnHandler)
    reported = []
    server.handle_error = lambda request, client_address: reported.append((client_address[0], sys.exc_info()[0]))
    with server, link_to(server) as link:
        for _ in range(2):      # the connection goes on
            got = ask_again(link, method, path, body, {"User-Agent": "tests"})
            assert got.status == status and (expected is None or got.body == expected), got
            assert "x-evil" not in got.headers and "b" not in got.headers
        if path == "/error":
            assert got.json["error"]["message"] == "I am a teapot: tea only"
    assert reported == {"/bug": [("127.0.0.1", KeyError)] * 2, "/split": [("127.0.0.1", ValueError)] * 2}.get(path, [])


@table({    # the bytes that follow the head, None: the connection is closed; lines that it has; lines that it must not have
    "a header sent twice": ("/cookies", b"0\r\n\r\n", (b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\n",), (b"Connection:",)),
    "no body": ("/unmodified", b"", (b"HTTP/1.1 304 ",), (b"Content-Length", b"Transfer-Encoding")),
    "the last response": ("/last", None, (b"Connection: close\r\n",), ()),
})
def test_the_head_is_what_a_handler_has_sent(path, body, has, has_not):
    with Server(Settings(server_address="127.0.0.1:0"), OwnHandler) as server, socket.create_connection(server.server_address, 10) as link:
        link.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with link.makefile("rb") as answer:
            head = b"".join(iter(answer.readline, b"\r\n"))
            assert all(line in head for line in has) and not any(line in head for line in has_not), head
            if body is None:
                assert answer.read() == b"0\r\n\r\n"
            else:
                link.sendall(b"GET /parts HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert answer.read(len(body) + 12) == body + b"HTTP/1.1 200"


def test_serve_forever_ends_with_shutdown():
    server = Server(("127.0.0.1", 0), OwnHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    assert ask(server, path="/parts").body == b"one two"
    server.shutdown()
    thread.join(10)
    assert not thread.is_alive() and refused(server.server_port)
    server.server_close()


@pytest.mark.parametrize("method, answer", [("verify_request", lambda *_: False), ("process_request", lambda *_: 1 / 0)])
def test_a_client_that_is_not_accepted_is_closed(method, answer):
    with type("Choosy", (Server,), {method: answer})(Settings(server_address="127.0.0.1:0")) as server:
        with contextlib.suppress(ConnectionError):
            assert talk(server, get()) == b""
        assert not server.connections


class FullSelect(selectors.SelectSelector):
    """The selector that Windows has; while it is .full it takes no more sockets."""

    full = False

    def register(self, *args):
        if self.full:
            raise OSError(errno.EMFILE, "select() can't watch more sockets")
        return super().register(*args)


class SelectServer(Server):
    """A server with that selector, whose accept() finds no descriptor while it is .exhausted."""

    exhausted = False

    def __init__(self, akash):
        super().__init__(Settings(server_address="127.0.0.1:0", akash_base_url=akash.url))
        self.loop.close()
        self.select = FullSelect()
        self.loop = akashproxy.EventLoop(self.on_tick, self.select)

    def get_request(self):
        if self.exhausted:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().get_request()


def test_select_is_as_prompt_as_epoll(akash):
    server = SelectServer(akash)
    server.loop.TICK = 0.5
    with server, link_to(server) as link:
        began = time.monotonic()
        for _ in range(20):
            assert ask_again(link, "POST", "/v1/chat/completions", CHAT).status == 200
            assert ask_again(link).status == 200
        assert time.monotonic() - began < 5, "each hand-over would wait for a tick"


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_select_has_no_room_for_is_an_error(akash, stream):
    server = SelectServer(akash)
    with server, link_to(server) as link:
        assert ask_again(link).status == 200
        server.select.full = True
        answer = ask_again(link, "POST", "/v1/chat/completions", {**CHAT, "stream": stream})
        assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
        server.select.full = False
        assert ask_again(link, "POST", "/v1/chat/completions", CHAT).status == 200


def test_accepting_resumes_once_select_has_room(akash):
    with SelectServer(akash) as server, connect(server):
        wait_for(lambda: server.connections)
        server.exhausted = True
        with connect(server, get()) as sock:
            wait_for(lambda: server.accept_paused)
            server.select.full = True
            time.sleep(3 * server.loop.TICK)
            server.exhausted = server.select.full = False
            assert status_of(sock) == 200


def test_more_sockets_than_select_takes_are_refused(akash, caplog):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] < 1200:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit[0], 1200), limit[1]))
    server, descriptor = SelectServer(akash), 0
    with contextlib.ExitStack() as taken, server, link_to(server) as link:
        assert ask_again(link).status == 200
        while descriptor < 1024:
            descriptor = os.dup(0)
            taken.callback(os.close, descriptor)
        with connect(server) as sock:
            assert sock.recv(10) == b"", "refused"
        assert ask_again(link).status == 200, "the others are served on"
        taken.close()
        assert ask(server).status == 200
    assert "could not be accepted" in caplog.text


# == truth in writing =========================================================================


def test_the_index_of_the_docstring_resolves():
    index = akashproxy.__doc__.partition("Where is ...")[2]
    names = re.findall(r"^    .+?  +([A-Za-z_.]+(?:, [A-Za-z_.]+)*)$", index, re.M)
    assert len(names) > 15
    for name in ", ".join(names).split(", "):
        value = akashproxy
        for part in name.split("."):
            value = getattr(value, part)


def test_the_sections_stand_in_the_docstrings_order():
    order = re.search(r"top to bottom.*?:\n(.*?)\.\n", akashproxy.__doc__, re.S)[1]
    banners = re.findall(r"^# == \d+\. (\w+) =+$", SOURCE, re.M)
    assert re.split(r",\s+", order) == banners


MAY_NAME = {    # a section: the sections whose names may stand in it
    "names": "", "errors": "names", "events": "names errors", "http": "names errors",
    "settings": "names errors transport openai",            # a CA file is checked by loading it, a type by CONTROLLERS
    "transport": "names errors events settings http",
    "streams": "names errors events settings http transport",
    "filters": "names errors events streams",
    "tools": "names errors events streams filters",
    "controllers": "names errors events settings transport streams filters tools",
    "failures": "names errors events settings http transport",
    "akash": "names errors events settings http transport streams filters controllers failures",
    "openai": "names errors events settings http transport streams filters controllers failures akash",  # CONTROLLERS
    "pool": "names errors events settings transport streams controllers openai",
    "dialects": "names errors events settings http filters pool",
    "loop": "names errors events settings http transport pool relay limits server",
    "relay": "names errors events http streams loop server",
    "limits": "names errors events settings streams controllers server",
    "server": "names errors events settings http transport controllers pool dialects loop relay limits page",
    "demo": "names", "page": "names", "main": "names errors settings pool server demo",
}


def test_sections_name_only_what_they_may():
    banners = [(match.start(), match[1]) for match in re.finditer(r"^# == \d+\. (\w+)", SOURCE, re.M)]
    starts = [SOURCE.count("\n", 0, at) + 1 for at, _ in banners]
    tree = ast.parse(SOURCE)
    section = lambda node: [name for line, (_, name) in zip(starts, banners) if line <= node.lineno][-1]
    home = {}
    for node in tree.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for name in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
            if name and node.lineno > starts[0]:
                home[name] = section(node)
    found = set()
    for node in tree.body:
        if node.lineno > starts[0]:
            names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
            local = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
            local |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
            found |= {(section(node), home[name.id], name.id) for name in names if name.id in home and name.id not in local}
    assert not {(at, other, name) for at, other, name in found if other != at and other not in MAY_NAME[at].split()}


def test_public_names_exist_and_have_a_docstring_and_the_readme_uses_no_others():
    assert set(re.findall(r"\bakashproxy\.(\w+)", "".join(EMBEDDING))) <= set(akashproxy.__all__)
    for name in akashproxy.__all__:
        value = getattr(akashproxy, name)
        if isinstance(value, (type, types.FunctionType)):
            assert value.__doc__, name


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def demo():
    with started("--demo", "--image-poll", "0.01", before="akashproxy.DemoAkash.delay = 0.001") as (process, port):
        yield port


CURLS = [block for block in blocks("sh") if "curl" in block]


@pytest.fixture(scope="module")
def curls(demo):
    """The blocks with curl as processes, all at once."""
    processes = {block: subprocess.Popen(["bash", "-ec", block.replace("127.0.0.1:16571", f"127.0.0.1:{demo}")], text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for block in CURLS}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("block", CURLS, ids=lambda block: block.split("\n")[0][:40])
def test_the_readmes_curl_lines_work(block, curls):
    out, errors = curls[block].communicate(timeout=60)
    assert curls[block].returncode == 0 and out and '"error"' not in out, (out, errors)


def official(block):
    return re.match("import (openai|anthropic)$", block, re.M)


OPENAI_KEY = {"OPENAI_API_KEY": "k"}


@table({    # (UPSTREAM, other variables): (base_url, api_key) of each controller
    "Ollama": ("http://127.0.0.1:11434/v1", {}, [("http://127.0.0.1:11434/v1", "")]),
    "two": ("http://a/v1,http://b", {}, [("http://a/v1", ""), ("http://b", "")]),
    "none is Akash": ("", {"AKASH_BASE_URL": "http://a/", "AKASH_ACCESS_TOKEN": "t"}, [("http://a", "t")]),
    "OpenAI": ("openai", OPENAI_KEY, [("https://api.openai.com/v1", "k")]),
    "OpenAI by address": ("https://api.openai.com/v1", OPENAI_KEY, [("https://api.openai.com/v1", "k")]),
    "OpenAI in Europe": ("https://eu.api.openai.com/v1", OPENAI_KEY, [("https://eu.api.openai.com/v1", "k")]),
    "a gateway's address": ("openai", {**OPENAI_KEY, "OPENAI_BASE_URL": "https://gw/v1/"}, [("https://gw/v1", "k")]),
    "a gateway without a key": ("openai", {"OPENAI_BASE_URL": "http://gw"}, [("http://gw", "")]),
    "another host": ("http://h/v1", OPENAI_KEY, [("http://h/v1", "")]),
    "another host, though it is OPENAI_BASE_URL's": ("https://gw/v1", {**OPENAI_KEY, "OPENAI_BASE_URL": "https://gw/v1"}, [("https://gw/v1", "")]),
    "a host that looks like it": ("https://api.openai.com.evil.example", OPENAI_KEY, [("https://api.openai.com.evil.example", "")]),
    "a user that looks like it": ("https://api.openai.com@evil.example", OPENAI_KEY, "only scheme, host, port and path"),
    "no key": ("openai", {}, "openai needs OPENAI_API_KEY"),
    "a typo": ("opnai", {}, "UPSTREAM: 'opnai' is not an http:// or https:// URL"),
    "a wrong address": ("openai", {**OPENAI_KEY, "OPENAI_BASE_URL": "x"}, "'x' is not an http"),
})
def test_upstreams_without_a_file(upstream, environ, wanted):
    if isinstance(wanted, str):
        with pytest.raises(akashproxy.ConfigError, match=wanted):
            Settings.load({"UPSTREAM": upstream, **environ})
    else:
        assert [(each.base_url, each.api_key) for each in Settings.load({"UPSTREAM": upstream, **environ}).pool()] == wanted


@table({    # UPSTREAM: the base_url that a warning suggests, if any
    "chat": ("http://h/v1/chat/completions", "http://h/v1"), "responses": ("http://h/v1/responses/", "http://h/v1"),
    "a reverse proxy's path": ("http://h/embeddings", "http://h"), "a path that looks like one": ("http://h/my-completions", None),
    "the usual": ("http://h/v1", None),
})
def test_a_base_url_that_ends_in_an_endpoint_is_used_with_a_warning(text, suggested, log):
    settings = Settings.load({"UPSTREAM": text, "PUBLIC_URL": "https://me/responses"})
    options = settings.pool()[0]
    akashproxy.CONTROLLERS["openai"](options, settings)
    assert options.base_url == text.rstrip("/")
    assert [record.getMessage().rpartition(" ")[2] for record in log.records] == ([suggested] if suggested else [])


def test_upstreams_replace_those_of_the_file(config):
    path = config({"controllers": [{"base_url": "http://file"}], "max_wait": 1})
    settings = Settings.load({}, {"config_file": path, "upstream": "http://a,http://b"})
    assert [(each.name, each.base_url) for each in settings.pool()] == [("openai", "http://a"), ("openai-2", "http://b")]
    assert [each.base_url for each in load(config({"upstream": ["http://c"]})).pool()] == ["http://c"]
    assert [each.base_url for each in Settings(upstream=("http://d",)).pool()] == ["http://d"]


def test_first_steps_without_a_file(openai_fakes):
    one, two, dead = openai_fakes
    with started("--upstream", one.url + "/v1", "--upstream", two.url) as (_, server):
        assert {each["id"] for each in ask(server, path="/v1/models").json["data"]} == {"llama3", "mistral", "phi"}
        got = ask(server, "POST", "/v1/chat/completions", {"model": "phi", "messages": [user("hi")]})
        assert got.status == 200 and route_of(got).startswith("openai-2")
    assert not [request for fake in (one, two) for request in fake.requests if "authorization" in request.headers]


def test_check_asks_each_controller(openai_fakes, akash, config):
    def expect(done, *patterns):
        lines = done.stdout.strip().splitlines()[-len(patterns):]
        assert all(re.fullmatch(pattern + r", \d+ ms", line) for pattern, line in zip(patterns, lines)), lines

    one, two, dead = openai_fakes
    done = run("--check", "--ask", UPSTREAM=f"{one.url}/v1,{two.url}", OPENAI_API_KEY="s3cret")
    assert done.returncode == 0, done
    expect(done, r"openai: reachable, no key needed, 2 models", r"openai-2: reachable, no key needed, 1 model")
    two.answer = two.raw(reply(401, b'{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}'))
    path = config({"akash_base_url": akash.url, "controllers": [
        {"name": "chat", "type": "akash"}, {"name": "bad", "base_url": two.url, "api_key": "s3cret"}, {"name": "ours", "type": "echo"},
        {"name": "dead", "base_url": dead}, {"name": "good", "base_url": one.url, "api_key": "s3cret"}]})
    done = run("--check", "--ask", "--config-file", path)
    assert done.returncode == 1 and "s3cret" not in done.stdout + done.stderr
    expect(done, r"chat: reachable, no key needed, \d+ models", "bad: reachable, key rejected: .*", "ours: reachable, no key needed, 1 model",
           r"dead: not reachable: 127\.0\.0\.1 refused the connection \(check that it runs, and the port\)", "good: reachable, key accepted, 2 models")
    two.answer = lambda sock, request: time.sleep(20)
    done = run("--check", "--ask", UPSTREAM=f"{two.url}/v1", SESSION_TIMEOUT="0.3")
    assert done.returncode == 1 and "did not answer within 0.3 seconds" in done.stdout
    for answer in (reply(404, b"404 page not found"), reply(200, b"[]"), reply(200, b"<html>", "text/html")):
        two.answer = two.raw(answer)
        expect(run("--check", "--ask", UPSTREAM=f"{two.url}/v1/chat"), r"openai: reachable, but lists no models: \w.*\w")


@table({"it has ended": (SIGNED_OUT, 1, ", but its login has ended: set a new cookie"), "it goes on": (signed_in("appSession=two"), 0, ""),
        "it can't be asked for": (None, 0, "")})
def test_check_asks_for_logins(answer, status, words, akash, config):
    akash.me = answer
    path = config({"akash_base_url": akash.url, "controllers": [{"name": "one", "type": "akash", "cookie": "appSession=s3cret"}, {"name": "none", "type": "akash"}]})
    done = run("--check", "--ask", "--config-file", path)
    one, none = done.stdout.strip().splitlines()[-2:]
    assert re.fullmatch(rf"one: reachable, no key needed, 3 models{words}, \d+ ms", one) and re.fullmatch(r"none: reachable, no key needed, 3 models, \d+ ms", none)
    assert done.returncode == status and "s3cret" not in one + done.stderr
    assert [request.path for request in akash.requests].count("/api/auth/me/") == 1


@pytest.fixture
def openai_fakes():
    """Two upstreams, and the URL of a port that nothing listens on."""
    gone = FakeOpenAI()
    gone.close()
    return FakeOpenAI(["llama3", "mistral"]), FakeOpenAI(["phi"]), gone.url


# -- path prefixes and reverse proxies

def image_link(akash, server, path="/v1/images/generations", headers=None):
    akash.chat = PICTURE_LINE
    return ask(server, "POST", path, {"prompt": "a fox"}, headers).json["data"][0]["url"]


@table({    # (PUBLIC_URL, headers, trusted): how image links begin; {} stands for the server's address
    "nothing": ("", {}, True, "http://{}/p/images/"),
    "a public URL": ("https://chat.example", {}, True, "https://chat.example/p/images/"),
    "one with a path": ("https://chat.example/a", {}, True, "https://chat.example/a/p/images/"),
    "one with the prefix": ("https://chat.example/a/p", {}, True, "https://chat.example/a/p/images/"),
    "a host called like the prefix": ("https://p", {}, True, "https://p/p/images/"),
    "a public URL wins": ("https://chat.example", {"X-Forwarded-Host": "b.example"}, True, "https://chat.example/p/images/"),
    "the scheme": ("", {"X-Forwarded-Proto": "https"}, True, "https://{}/p/images/"),
    "all": ("", {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "b.example:8443", "X-Forwarded-Prefix": "/x/"}, True,
            "https://b.example:8443/x/p/images/"),
    "of two proxies the outer one": ("", {"X-Forwarded-Proto": "https, http", "X-Forwarded-Host": "b.example, c"}, True,
                                     "https://b.example/p/images/"),
    "a prefix that is ours": ("", {"X-Forwarded-Prefix": "/p"}, True, "http://{}/p/images/"),
    "not trusted": ("", {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "b.example", "X-Forwarded-Prefix": "/x"}, False, "http://{}/p/images/"),
    "wrong values": ("", {"X-Forwarded-Proto": "javascript", "X-Forwarded-Host": "a/b", "X-Forwarded-Prefix": "//b.example"}, True,
                     "http://{}/p/images/"),
})
def test_links_behind_a_reverse_proxy(public_url, headers, trusted, start, serve, akash):
    server = serve(public_url=public_url, path_prefix="/p", trusted_proxies=("127.0.0.1" if trusted else "10.0.0.0/8",))
    assert image_link(akash, server, "/p/v1/images/generations", headers).startswith(start.format(f"127.0.0.1:{server.server_port}"))


@table({    # X-Forwarded-For as it comes from 127.0.0.1, with 127.0.0.0/8 and 10.0.0.0/8 trusted: the client in the log
    "none": ("", "127.0.0.1"), "one": ("192.0.2.7", "192.0.2.7"), "IPv6": ("2001:db8::1", "2001:db8::1"),
    "with a port": ("192.0.2.7:4711", "192.0.2.7"), "IPv6 with a port": ("[2001:db8::1]:4711", "2001:db8::1"),
    "forged in front": ("6.6.6.6, 192.0.2.7", "192.0.2.7"), "by an inner proxy": ("192.0.2.7, 10.1.2.3", "192.0.2.7"),
    "only proxies": ("10.1.2.3, 10.1.2.4", "10.1.2.3"), "garbage": ("192.0.2.7, x", "127.0.0.1"), "empty parts": (",,192.0.2.7", "192.0.2.7"),
    "mapped": ("192.0.2.7, ::ffff:10.1.2.3", "192.0.2.7"), "very many": (", ".join(["10.1.2.3"] * 5000), "10.1.2.3"),
})
def test_the_client_in_the_log_behind_a_reverse_proxy(value, client, serve, log):
    ask(serve(trusted_proxies=("127.0.0.0/8", "10.0.0.0/8")), path="/v1/models", headers={"X-Forwarded-For": value})
    wait_for(lambda: f"client={client} " in log.text)


@pytest.mark.parametrize("peer", ["", "unix:", "/run/proxy.sock", "localhost", "::1::", "\0", "1.2.3.4:5"])
def test_a_peer_without_an_ip_address_is_no_trusted_proxy(peer):
    assert akashproxy.is_trusted(peer, ("0.0.0.0/0", "::/0")) is False


def test_forwarded_headers_open_no_gate(serve):
    """A page that has rebound its domain to this machine may send any header."""
    server = serve()
    for headers in ({"X-Forwarded-Host": "localhost"}, {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http"}):
        assert ask(server, path="/v1/models", headers={"Host": "b.example", **headers}).status == 403
    headers = {"Origin": "https://b.example", "X-Forwarded-Host": "b.example", "X-Forwarded-Proto": "https"}
    assert ask(server, path="/v1/models", headers=headers).status == 403
    preflight = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-forwarded-host"}
    assert ask(server, "OPTIONS", "/v1/models", headers=preflight).status == 403


@pytest.mark.parametrize("block", blocks("python"))
def test_the_readmes_python_works(block, demo, akash, capsys):
    block = block.replace("127.0.0.1:16571", f"127.0.0.1:{demo}").replace("https://chat.akash.network", akash.url)
    if official(block):     # in this process, which imports these clients anyway
        pytest.importorskip(official(block)[1])
        exec(block, {})
        assert capsys.readouterr().out
        return
    done = subprocess.run([sys.executable, "-c", block], env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}, cwd=HERE,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done


@pytest.mark.parametrize("block", [block for block in blocks("sh") if re.search("^(.*claude|codex) ", block)])
def test_the_readmes_lines_for_agents_work(block, pool, tmp_path):
    program = re.search(r"\b(claude|codex)\b", block)[1]
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    server = pool(FakeOpenAI(["llama3.2"]), model_aliases={"claude-*": "llama3.2"}, idle_timeout=20, first_byte_timeout=20)
    done = subprocess.run(["bash", "-ec", block.replace("127.0.0.1:16571", f"127.0.0.1:{server.server_port}")], cwd=tmp_path, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DISABLE_TELEMETRY": "1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Hi there." in done.stdout, done


@pytest.mark.parametrize("program, row", {     # program: (its row in the README's table of clients, what gets an answer, where {} is the row's own command)
    "opencode": ("opencode, kilo", "opencode run -m akashproxy/llama3.2 'Say hello.'"), "qwen": ("qwen-code", "{} -p 'Say hello.'"),
    "pi": ("pi", "pi --provider akashproxy --model llama3.2 -p 'Say hello.'"),
    "cline": ("cline", "{} && cline 'Say hello.'"), "sgpt": ("shell-gpt", "sgpt 'Say hello.'"),
    "llm": ("llm", "llm -m akashproxy 'Say hello.'"), "gptme": ("gptme", "{} -n 'Say hello.'"),
    "aider": ("aider", "{} --no-git --yes-always --no-check-update --no-show-model-warnings --message 'Say hello.'"),
}.items())
def test_the_readmes_table_of_clients_works(program, row, pool, tmp_path):
    client, command = row
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    server = pool(FakeOpenAI(["llama3.2"]), idle_timeout=20, first_byte_timeout=20)
    row = re.search(rf"^\| {client} \| (.*) \|$", README, re.M)[1].replace("127.0.0.1:16571", f"127.0.0.1:{server.server_port}")
    first, *lines = re.findall("`(.*?)`", row)
    if lines:   # a file and its lines
        path = tmp_path / first.replace("~/", "").replace("extra-", ".config/io.datasette.llm/extra-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in lines))
    done = subprocess.run(["bash", "-ec", command.format(first)], cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert "Hi there." in done.stdout, done


def test_the_readmes_row_for_langchain_works(fake, pool):
    chat_models = pytest.importorskip("langchain_openai")
    row = re.search(r"^\| LangChain \| `(.*)` \|$", README, re.M)[1].replace("127.0.0.1:16571", f"127.0.0.1:{pool(fake).server_port}")
    model = eval(row.replace("llama3.2", "gpt-x"), vars(chat_models).copy())
    assert model.invoke("Say hello.").content == "Hi there."


def test_the_readmes_row_for_the_ai_sdk_works(fake, pool):
    package = 'const {createOpenAICompatible} = require("@ai-sdk/openai-compatible");'
    if not shutil.which("node") or subprocess.run(["node", "-e", package], capture_output=True).returncode:
        pytest.skip("no AI SDK here; NODE_PATH can be its folder")
    row = re.search(r"^\| AI SDK \| `(.*)` \|$", README, re.M)[1].replace("127.0.0.1:16571", f"127.0.0.1:{pool(fake).server_port}")
    call = "doGenerate({prompt: [{role: 'user', content: [{type: 'text', text: 'Say hello.'}]}]})"
    script = f"{package} {row}('gpt-x').{call}.then(({{content}}) => console.log(content[0].text))"
    assert subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60).stdout == "Hi there.\n"


EMBEDDING = [block for block in blocks("python") if not official(block)]


@pytest.mark.parametrize("checker, options", [("mypy", ["--strict", "--cache-dir=."]), ("pyright", ["--project", "."])])
def test_type_checkers_accept_the_readmes_embedding(checker, options, tmp_path):
    pytest.importorskip(checker)
    for number, block in enumerate(EMBEDDING):
        (tmp_path / f"embedding_{number}.py").write_text(block)
    (tmp_path / "wrong.py").write_text("import akashproxy\nevent: akashproxy.Event = 7\n")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(HERE)]}))
    environ = {**os.environ, "MYPYPATH": str(HERE), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run([sys.executable, "-m", checker, *options, *sorted(path.name for path in tmp_path.glob("*.py") if checker == "mypy")],
                          cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stdout.splitlines() if "error:" in line or "- error" in line]
    assert len(errors) == 1 and "wrong.py:2" in errors[0], done


def test_the_readmes_controller_for_http_works(pool, own):
    class Generating(Fake):
        def answer(self, sock, request):
            sock.sendall(reply(body={"text": json.loads(request.body)["prompt"][::-1]}))

    block = next(block for block in EMBEDDING if "Transport" in block)
    exec(block.partition("options = ")[0], {})
    fake, other = Generating(), FakeOpenAI()
    server = pool((fake, {"type": "generate", "base_url": fake.url, "models": (BOTH["model"],)}), (other, {"priority": 2}))
    assert text_of(chat(server, BOTH, messages=[user("abc")])) == "cba"
    fake.sends(reply(500))
    assert route_of(chat(server, BOTH, messages=[user("abc")])) == "a=502, b=200"


def test_the_readmes_links_lead_to_its_headings():
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= headings


def test_the_readmes_first_command_is_the_main_job():
    first = blocks("sh")[0].split("\n")[0]
    assert first == "python3 akashproxy.py --demo"


def test_every_setting_and_every_route_is_in_the_readme():
    of_controllers, of_keys = (akashproxy.setting_fields(cls) for cls in (akashproxy.ControllerSettings, akashproxy.ClientKeySettings))
    for heading, fields in (("Settings", SETTINGS), ("Several upstreams", of_controllers), ("Client keys", of_keys)):
        left = dict(fields)
        for first, defaults, *helps in (cells for cells in table_rows(heading) if len(cells) == 3):
            items = [left.pop(name, None) for name in re.findall(r"`(\w+)`", first)]
            if any(items):      # several in one row have what each one has, in their order
                assert defaults == ", ".join(f"`{text}`" for text in map(akashproxy.default_text, items) if text), first
                assert helps == ["; ".join(item.metadata["help"] for item in items)], first
        assert not left
    for path in akashproxy.ROUTES:
        assert f"`{path.replace('{}', '{id}' if path.startswith('/v1') else '{name}')}`" in README, path


def test_every_variable_that_is_read_is_in_the_readmes_tables():
    class Environment(dict):
        def get(self, name, default=None):
            read.add(name.upper())
            return super().get(name, default)

    read = set()
    Settings.load(Environment(UPSTREAM="openai", OPENAI_API_KEY="k"))
    documented = {name for row in re.findall(r"^\| (`[A-Z].*?) \|", README, re.M) for name in re.findall(r"`([A-Z_]+)`", row)}
    assert {"PORT", "MAX_WAIT", "HTTPS_PROXY"} < read and read - {""} <= documented


def test_the_readmes_configuration_is_one(config):
    for block in blocks("json"):
        path = config(block)
        environ = {name: f"value-of-{name}" for name in re.findall(r"\$\{(\w+)\}", block)}
        settings = load(path, **environ)
        data = json.loads(block)
        assert (len(settings.pool()), len(settings.keys)) == (len(data.get("controllers", "1")), len(data.get("keys", ())))
        assert run("--config-file", path, "--check", **environ).returncode == 0


def test_the_dockerfile_fits_the_code(tmp_path):
    build, final = (DOCKERFILE.replace("\\\n", "").partition("AS build\n")[2]).split("\nFROM ${BASE}\n")
    assert set(re.findall(r"LABEL(.*)", final)[0].split()) >= {'org.opencontainers.image.licenses="MIT"', 'org.opencontainers.image.version="${VERSION}"'}
    final = dict(line.split(" ", 1) for line in final.splitlines() if line and not line.startswith("#"))
    assert final["ENV"] == "DEFAULT_SERVER_ADDRESS=0.0.0.0:16571" and final["EXPOSE"] == "16571" and final["USER"] == "65532:65532"
    entry = json.loads(final["ENTRYPOINT"])
    assert entry == ["/usr/bin/python3", "-I", "/akashproxy.pyc"] and json.loads(final["HEALTHCHECK"].partition("CMD ")[2]) == entry + ["--health"]
    assert final["COPY"] == "--from=build /build/akashproxy.pyc /build/akashproxy.py /"
    # the build's step, and what it makes, with this Python
    step = [part.replace("/build", str(tmp_path)) for part in json.loads(re.search(r"^RUN (.*)$", build, re.M)[1])]
    shutil.copy(HERE / "akashproxy.py", tmp_path)
    subprocess.run([sys.executable, *step[1:]], check=True)
    done = subprocess.run([sys.executable, "-I", str(tmp_path / "akashproxy.pyc"), "--version"], capture_output=True, text=True)
    assert done.stdout == f"akashproxy {akashproxy.__version__}\n"


IMAGE = dict([re.search(r"^ENV (\S+)=(\S+)$", DOCKERFILE, re.M).groups()])
OTHER, OWN_FILE, ORIGINALS = {"CONFIG_FILE": "other.json"}, "akashproxy.json", "chatgpt-apiserver.json"


@table({
    # name: (variables, the file's name, what is in it or None if there is no file, flags, the address)
    "nothing is said": ({}, OWN_FILE, {}, {}, "localhost:16571"),
    "the original's file": ({}, ORIGINALS, {}, {}, ":8080"), "its port": ({}, ORIGINALS, {"port": "1"}, {}, ":1"),
    "its address": ({}, ORIGINALS, {"server_address": ":2"}, {}, ":2"),
    "a file with the original's config": (OTHER, "other.json", {"controllers": [{"type": "echo", "config": {}}]}, {}, ":8080"),
    "one with its config_file": (OTHER, "other.json", {"controllers": [{"type": "echo", "config_file": ""}]}, {}, ":8080"),
    "one without": (OTHER, "other.json", {"controllers": [{"type": "echo"}]}, {}, "localhost:16571"),
    "PORT": ({"PORT": "7860"}, OWN_FILE, {}, {}, ":7860"), "an empty PORT": ({"PORT": ""}, OWN_FILE, {}, {}, "localhost:16571"),
    "an address before PORT": ({"PORT": "7860", "SERVER_ADDRESS": "localhost:1"}, OWN_FILE, {}, {}, "localhost:1"),
    "a flag before PORT": ({"PORT": "7860"}, OWN_FILE, {}, {"server_address": ":2"}, ":2"),
    "the file's address before PORT": ({"PORT": "7860"}, OWN_FILE, {"server_address": "localhost:3"}, {}, "localhost:3"),
    "PORT before the file's port": ({"PORT": "7860"}, OWN_FILE, {"port": 8080}, {}, ":7860"),
    "PORT in the image": ({"PORT": "7860", **IMAGE}, OWN_FILE, {}, {}, ":7860"),
    "the image": (IMAGE, OWN_FILE, None, {}, "0.0.0.0:16571"), "the image, and a file": (IMAGE, OWN_FILE, {"max_wait": 1}, {}, "0.0.0.0:16571"),
    "a port in it": (IMAGE, OWN_FILE, {"port": 9000}, {}, ":9000"), "an address in it": (IMAGE, OWN_FILE, {"server_address": "[::]:7"}, {}, "[::]:7"),
    "the image, and the original's file": (IMAGE, ORIGINALS, {"controllers": [{"type": "openai", "config": {"api_key": "k"}}]}, {}, ":8080"),
    "a port in that": (IMAGE, ORIGINALS, {"port": "9000", "controllers": [{"type": "openai", "config": {"api_key": "k"}}]}, {}, ":9000"),
    "an address for the image": ({**IMAGE, "SERVER_ADDRESS": "0.0.0.0:5"}, OWN_FILE, {"port": 9000}, {}, "0.0.0.0:5"),
    "the original's variable": ({**IMAGE, "CHATGPT_APISERVER_PORT": "6"}, OWN_FILE, {"port": 9000}, {}, ":6"),
    "that without a file": ({**IMAGE, "CHATGPT_APISERVER_PORT": "6"}, OWN_FILE, None, {}, ":6"),
})
def test_where_it_listens(environ, name, data, flags, listens, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        config(data, name)
    assert Settings.load(environ, flags).server_address == listens


def test_an_invalid_port_of_the_environment_is_not_blamed_on_the_file(config):
    assert error_of(ConfigError, Settings.load, {"CONFIG_FILE": config({"port": 1}), "PORT": "x"}).problems == ["PORT: 'x' is not a valid port"]


def test_the_readmes_docker_lines_mount_files_where_they_are_found():
    mounted = re.findall(r"docker run .* -v \"\$PWD/([^:]+):([^:]+):ro\" akashproxy", README)
    assert [file for file, _ in mounted] == akashproxy.FILE_NAMES
    assert all(os.path.dirname(path) in akashproxy.CONFIG_DIRECTORIES and os.path.basename(path) == file for file, path in mounted)


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_the_bench(number, tmp_path):
    command = re.search("^.venv/bin/python (.* bench)$", "".join(blocks("sh")), re.M)[1].split()
    process = subprocess.Popen([sys.executable, *command, "0.02" if number is None else "60", "20"], cwd=HERE, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)})
    if number is not None:
        assert process.stderr.readline() == "whole, 16 clients, Akash, direct ...\n"
        process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == (128 + number if number else 0) and "Traceback" not in errors, errors
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if "|" in line]
    assert head == list(COLUMNS)
    if number is None:
        assert [tuple(entry[:3]) for entry in rows] == list(itertools.product(
            ("whole, 16 clients", "bursts, 16 streams", "spaced, 2 streams", "spaced, 20 streams"), PATHS, ("direct", "akashproxy")))
        for entry in rows:
            numbers = [float(part) for cell in entry[3:7] for part in cell.strip("*").split(" / ")]
            assert len(entry) == len(COLUMNS) and len(numbers) == 6 and min(numbers) > 0 and entry[-1] == "0", entry
            assert numbers[2] <= numbers[3] and numbers[4] <= numbers[5] and (entry[2] == "direct") == (entry[7:10] == ["-"] * 3), entry
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):     # those of multiprocessing end a moment after the one that they served
        wait_for(lambda: os.killpg(process.pid, 0))


@table({
    # name: (what is sent of the parts of an answer of four tokens, how much is lost)
    "nothing": (lambda parts: [b"".join(parts)], 0),
    "nothing, in single bytes": (lambda parts: re.findall(b"(?s).", b"".join(parts)), 0),
    "a token": (lambda parts: [parts[0], *parts[2:]], 1),
    "one is doubled": (lambda parts: [*parts[:2], *parts[1:]], 1),
    "two are swapped": (lambda parts: [parts[0], parts[2], parts[1], parts[3]], 4),
    "the rest": (lambda parts: parts[:2], 2),
    "only the end": (lambda parts: [*parts[:3], parts[3].replace(b"[DONE]", b"[GONE]")], 1),
    "only the end of the message": (lambda parts: [*parts[:3], parts[3][:-5]], 1),
    "all": (lambda parts: [], 4),
    "an error": (lambda parts: [reply(500, b"{}")], 5),
})
def test_the_bench_finds_what_is_lost(sent, lost, fake):
    parts = [part.replace(SENT, b"%020d" % time.monotonic_ns()) for part in prepared(akashproxy.CHAT_PATH, True, 4, PAUSE)]
    fake.faults.append(lambda sock, request: [sock.sendall(data) for data in sent(parts)] and None)
    load = Load(fake.port, akashproxy.CHAT_PATH, True, 4, PAUSE, 1, 0.0).run()
    assert load.lost == lost and all(0 < way < 60e9 for way in load.ways)


def test_what_a_process_uses_is_told_or_unknown(monkeypatch):
    known = usage(os.getpid())
    for path, where in ((os.environ["PATH"], "ps"), ("", None)):
        monkeypatch.setenv("PATH", path)
        seconds, memory = usage(os.getpid(), proc="/none")
        if where and shutil.which(where):
            assert seconds >= 0 and memory > 10 and (math.isnan(known[1]) or memory < known[1] * 2)
        else:
            assert shown(seconds) == shown(memory) == "-"
    assert shown(usage(None)[0]) == "-"


def test_the_limit_of_open_files_limits_the_streams(capsys):
    limits, endless = [], -1
    system = types.SimpleNamespace(RLIMIT_NOFILE=7, RLIM_INFINITY=endless, getrlimit=lambda which: limits[-1],
                                   setrlimit=lambda which, limit: limits.append(limit))
    for given, streams, after in (((256, 4096), 1000, (2100, 4096)), ((256, endless), 1000, (2100, endless)),
                                  ((4096, 4096), 1000, (4096, 4096)), ((256, 500), 200, (500, 500)), ((64, 64), 1, (64, 64))):
        limits.append(given)
        assert (most_streams(1000, system), limits[-1]) == (streams, after)
        assert (f"{streams} streams instead of 1000" in capsys.readouterr().out) == (streams < 1000)


# == official clients =========================================================================


@pytest.fixture
def openai_client(akash, serve):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=serve().url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(openai_client):
    answer = openai_client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "Hello from the mock." and answer.choices[0].finish_reason == "stop"
    chunks = list(openai_client.chat.completions.create(**CHAT, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello from the mock."
    with openai_client.chat.completions.stream(**CHAT) as events:
        assert events.get_final_completion().choices[0].message.content == "Hello from the mock."


def test_openai_models_and_images(openai_client, akash):
    assert [model.id for model in openai_client.models.list()][1] == "Qwen/Qwen3"
    assert openai_client.models.retrieve("Qwen/Qwen3").owned_by == "Akash Network"
    akash.chat = PICTURE_LINE
    assert openai_client.images.generate(prompt="x").data[0].url.endswith(".png")
    assert base64.b64decode(openai_client.images.generate(prompt="x", response_format="b64_json").data[0].b64_json) == PNG


def test_openai_errors(openai_client, akash):
    import openai
    akash.sends(UPSTREAM["model-unknown"][0])
    error = error_of(openai.InternalServerError, openai_client.with_options(max_retries=2).chat.completions.create, **CHAT)
    assert error.code == "model_not_found" and len(akash.bodies()) == 1, "x-should-retry is obeyed"
    akash.faults.append(akash.cut(b'0:"one "\n'))
    with pytest.raises(openai.APIError, match="broke off"):
        list(openai_client.chat.completions.create(**CHAT, stream=True))


CALLS_OF_TOOLS = [calls((0, "call_1", "f", "")), calls((0, None, None, '{"city":"Oslo"}')), calls((1, "call_2", "g", ""))]


def test_openai_async_and_retries(a, pool):
    openai = pytest.importorskip("openai")
    server = pool((a, {"paths": ["/none"]}))

    async def talk():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=1) as client:
            a.faults.append(a.status(500))      # the client asks once more
            chunks = [chunk async for chunk in await client.chat.completions.create(**BOTH, stream=True)]
            async with client.responses.stream(model="both", input="hi") as events:
                await events.until_done()
                return chunks, await events.get_final_response()

    chunks, response = asyncio.run(talk())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == response.output_text == "Hi there." and len(a.bodies()) == 3


def test_openai_tools_and_forms(pool):
    openai = pytest.importorskip("openai")
    import pydantic
    a = FakeOpenAI(text='{"city": "Oslo"}')
    with openai.OpenAI(base_url=pool((a, {"paths": ["/none"]})).url + "/v1", api_key="none", max_retries=0) as client:
        form = pydantic.create_model("Place", city=(str, ...))
        assert client.responses.parse(model="both", input="hi", text_format=form).output_parsed.city == "Oslo"
        assert client.chat.completions.parse(**BOTH, response_format=form).choices[0].message.parsed.city == "Oslo"
        schemas = [body["response_format"]["json_schema"] for body in a.bodies()]
        assert schemas[0]["schema"] == schemas[1]["schema"] and schemas[0]["name"] == "Place" and schemas[0]["strict"] is True
        a.faults.extend([answered({"reasoning_content": "hm"}, {"content": "wait"}, *CALLS_OF_TOOLS, finish="tool_calls")] * 3)
        tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
        with client.responses.stream(model="both", input=[user("hi")], tools=tools) as events:
            kinds = [event.type for event in events]
            response = events.get_final_response()
        assert "response.function_call_arguments.delta" in kinds and "response.reasoning_summary_text.delta" in kinds
        complete = client.responses.create(model="both", input=[user("hi")], tools=tools)
        for reply in (response, complete):
            assert [item.type for item in reply.output] == ["reasoning", "message", "function_call", "function_call"]
            assert [(item.name, item.arguments) for item in reply.output[2:]] == [("f", '{"city":"Oslo"}'), ("g", "{}")]
        with client.chat.completions.stream(**BOTH, tools=[tool()]) as events:
            assert events.get_final_completion().choices[0].message.tool_calls[0].function.arguments == '{"city":"Oslo"}'
        client.responses.create(model="both", tools=tools, input=[user("hi"), *complete.output, *(
            {"type": "function_call_output", "call_id": item.call_id, "output": "rain"} for item in complete.output[2:])])
        assert a.bodies()[-1]["messages"] == [user("hi"), {**called(("call_1", "f", '{"city":"Oslo"}'), ("call_2", "g", "{}")), "content": "wait", "reasoning_content": "hm"}, *(
            returned(id, "rain") for id in ("call_1", "call_2"))]


def test_openai_responses_that_fail(a, pool):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=pool(a).url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="nothing is stored"):
            client.responses.create(model="both", input="hi", previous_response_id="resp_1")
        with pytest.raises(openai.NotFoundError, match="not stored"):
            client.responses.retrieve("resp_1")
        a.faults.append(a.cut(1))
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.responses.create(model="both", input="hi", stream=True))
        a.faults.append(answered({"content": "Hi"}, finish="length"))
        assert client.responses.create(model="both", input="hi").incomplete_details.reason == "max_output_tokens"


@pytest.fixture
def claude(pool):
    """(the official client, the upstream behind the server that it speaks to)"""
    anthropic = pytest.importorskip("anthropic")
    fake = FakeOpenAI()
    server = pool(fake, model_aliases={"claude-*": "both"}, bearer_token=("token",))
    with anthropic.Anthropic(base_url=server.url, api_key="token", max_retries=0) as client:
        yield client, fake


CLAUDE = {**ASKED, "model": "claude-some-9"}


def test_anthropic_messages(claude):
    client, fake = claude
    message = client.messages.create(**CLAUDE, system="brief", stop_sequences=["x"], metadata={"user_id": "u"})
    assert (message.content[0].text, message.stop_reason, message.model, message.role) == ("Hi there.", "end_turn", "claude-some-9", "assistant")
    assert fake.bodies()[0]["model"] == "both" and message.usage.input_tokens > 0
    with client.messages.stream(**CLAUDE) as stream:
        assert "".join(stream.text_stream) == "Hi there." and stream.get_final_message().usage.output_tokens == 3
    assert client.messages.count_tokens(model="claude-some-9", messages=[user([text_part("hi")])]).input_tokens > 0
    assert [model.id for model in client.models.list()] == ["gpt-x", "both"] and client.models.retrieve("claude-some-9").type == "model"


def test_anthropic_tools(claude):
    client, fake = claude
    tools = [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}, {"name": "g", "input_schema": {"type": "object"}}]
    fake.faults.extend([answered({"reasoning_content": "hm"}, {"content": "wait"}, *CALLS_OF_TOOLS, finish="tool_calls")] * 2)
    asked = {**CLAUDE, "max_tokens": 4096, "tools": tools, "tool_choice": {"type": "any"}, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    with client.messages.stream(**asked) as stream:
        assert [event.partial_json for event in stream if event.type == "input_json"] == ['{"city":"Oslo"}']
        streamed = stream.get_final_message()
    for message in (streamed, client.messages.create(**asked)):
        assert message.stop_reason == "tool_use" and [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert [(block.id, block.name, block.input) for block in message.content[2:]] == [("call_1", "f", {"city": "Oslo"}), ("call_2", "g", {})]
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": [text_part("rain")]} for block in streamed.content[2:]]
    client.messages.create(**{**CLAUDE, "messages": [user("hi"), assistant(streamed.content), user(results)]})
    assert [message["role"] for message in fake.bodies()[-1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert fake.bodies()[-1]["messages"][1] == {**called(("call_1", "f", '{"city":"Oslo"}'), ("call_2", "g", "{}")), "content": "wait", "reasoning_content": "hm"}


def test_anthropic_errors(claude):
    import anthropic
    client, fake = claude
    for status, error in ((400, anthropic.BadRequestError), (500, anthropic.InternalServerError)):
        fake.faults.append(fake.status(status))
        with pytest.raises(error, match="told") as caught:
            client.messages.create(**CLAUDE)
        assert caught.value.body["type"] == "error"
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**CLAUDE)
    fake.faults.append(fake.cut(1))
    with pytest.raises(anthropic.APIStatusError, match="broke off"), client.messages.stream(**CLAUDE) as stream:
        stream.get_final_message()

    async def talk():
        async with anthropic.AsyncAnthropic(base_url=client.base_url, auth_token="token", max_retries=0) as other:
            return await other.beta.messages.create(**CLAUDE)

    assert asyncio.run(talk()).content[0].text == "Hi there."
    fake.faults.append(fake.status(429))
    with pytest.raises(anthropic.RateLimitError, match="told"):
        client.messages.create(**CLAUDE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["soak"]:
        print("early and late (kB, threads, files):", *soak(int((sys.argv + ["50000"])[2]), print))
    elif sys.argv[1:2] == ["bench"]:
        sys.exit(bench(*(kind(word) for kind, word in zip((float, int), sys.argv[2:]))))
    else:
        sys.exit("usage: python3 test_akashproxy.py bench [SECONDS [STREAMS]], or soak [REQUESTS]; the tests: "
                 "python3 -m pytest test_akashproxy.py")
