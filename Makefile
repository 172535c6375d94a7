# Every recipe is a short call: what it does stands in scripts/, in the binary, or in cargo.
# `make` alone shows this list.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
# Programs that make network namespaces or load BPF run as root.
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || echo 'sudo -E env "PATH=$$PATH"')
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help setup build demo test bench fmt lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: ## install what is missing to build and test (Debian 12; asks for sudo only if needed)
	@scripts/setup

build: setup ## release build of the agent: target/release/sluice
	$(CARGO) build --release --package sluice

demo: setup ## the main job end to end, on network namespaces; ends with PASS or FAIL
	$(CARGO) build --package sluice
	$(AS_ROOT) $(TARGET_DIR)/debug/sluice lab demo

test: setup ## format check, lints, every test; ends with the sum
	@scripts/test

bench: build ## nanoseconds per packet of each path, against an empty program
	$(AS_ROOT) $(TARGET_DIR)/release/sluice bench progrun

fmt: ## format every crate
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path xdp/ebpf/Cargo.toml

lint: ## clippy as `make test` runs it
	$(CARGO) clippy --workspace --all-targets -- -D warnings

clean: ## remove what builds made; what `make setup` built stays
	$(CARGO) clean
