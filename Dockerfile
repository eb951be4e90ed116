# One file on distroless Python: no shell, no package manager, not root.
FROM gcr.io/distroless/python3-debian13:nonroot
COPY akashproxy.py /akashproxy.py
# where to listen unless SERVER_ADDRESS or a mounted configuration file says otherwise
ENV DEFAULT_SERVER_ADDRESS=0.0.0.0:16571
EXPOSE 16571
USER 65532:65532
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["/usr/bin/python3", "-I", "/akashproxy.py", "--health"]
ENTRYPOINT ["/usr/bin/python3", "-I", "/akashproxy.py"]
