# One module on distroless Python: no shell, no package manager, not root. Tags move; for builds that
# never change pin a digest: BASE=gcr.io/distroless/python3-debian13@sha256:...
ARG BASE=gcr.io/distroless/python3-debian13:nonroot

# Compiled once: the start and each health check save the time to compile it again.
FROM ${BASE} AS build
USER 0:0
COPY akashproxy.py /build/akashproxy.py
RUN ["/usr/bin/python3", "-I", "-c", "import py_compile; py_compile.compile('/build/akashproxy.py', '/build/akashproxy.pyc', '/akashproxy.py', doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"]

FROM ${BASE}
ARG VERSION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="akashproxy" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="MIT"
# the source lies beside what runs, to be read, and for the lines of tracebacks
COPY --from=build /build/akashproxy.pyc /build/akashproxy.py /
# where to listen unless SERVER_ADDRESS or a mounted configuration file says otherwise
ENV DEFAULT_SERVER_ADDRESS=0.0.0.0:16571
EXPOSE 16571
USER 65532:65532
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["/usr/bin/python3", "-I", "/akashproxy.pyc", "--health"]
ENTRYPOINT ["/usr/bin/python3", "-I", "/akashproxy.pyc"]
