# syntax=docker/dockerfile:1
# The agent, and every other role of the one binary. Build: docker build -t haul .
# Run: docker run -e AGENT_NODE_NAME=worker-001 -e AGENT_AMQP_URL=amqps://… -v haul:/data haul

FROM docker.io/library/rust:1.94-bookworm AS build
WORKDIR /source
# Dependencies first: they change seldom and take nearly all of the time.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src && printf 'fn main() {}\n' > src/main.rs && : > src/lib.rs \
    && cargo build --release --locked \
    && rm -rf src
COPY . .
# The stand-ins above are newer than the copied sources as far as time stamps tell.
RUN touch src/main.rs src/lib.rs && cargo build --release --locked

FROM docker.io/library/debian:bookworm-slim
# Certificates for https and amqps; the SSH client only for upstreams reached over SSH. No git is needed.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates openssh-client tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 haul \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin haul \
    && install -d -o 10001 -g 10001 -m 0750 /data
COPY --from=build /source/target/release/haul /usr/local/bin/haul
COPY LICENSE-MIT LICENSE-APACHE /usr/share/doc/haul/
ENV AGENT_STORAGE_PATH=/data
USER 10001:10001
VOLUME /data
# First signal: finish what runs, within shutdown.grace. Give the container longer than that (docker stop -t 60).
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/haul"]
CMD ["worker"]
