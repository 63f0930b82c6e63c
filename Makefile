# The two commands: `make demo` shows what it does, `make test` proves it.
# Both install what they need on Debian 12 with Rust (see tests/lanes/setup).

.PHONY: help demo test build clean

help:
	@echo 'make demo   build, boot the built-in guest, show a short gdb session (about a minute)'
	@echo 'make test   every check and test: pure, protocol, and on three flavours of KVM (about half an hour)'
	@echo 'make build  the trapline command, optimised, in target/release/'

demo:
	@tests/demo

test:
	@tests/run

build:
	cargo build --release --locked

clean:
	cargo clean
