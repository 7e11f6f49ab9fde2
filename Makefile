# Everything a contributor runs. `make` alone lists the targets.
#
# The repository holds several Go modules: the library at the top, which links little,
# and nested ones for what needs more. Loops below go over all that git knows.

SHELL := /bin/bash -o pipefail
GO ?= go
# The peers that the benchmarks build are none of these: they are there to be measured, and
# one that does not build costs its rows of the table only.
MODULES := $(filter-out tools benchmarks/peers/%,$(patsubst %/,%,$(dir $(shell git ls-files '*go.mod' 2>/dev/null || find . -name go.mod -printf '%P\n'))))
# IMAGE is what `make demo` imports: an OCI layout or archive, or the output of docker save.
IMAGE ?=
# TESTFLAGS are added to every go test, as in make test TESTFLAGS='-run Create -v'.
TESTFLAGS ?=
FUZZTIME ?= 20s
# BENCHFLAGS are those of benchmarks/; make bench-quick BENCHFLAGS=-help lists them.
BENCHFLAGS ?=
# VMFLAGS are those of internal/vmtest; docs/testing-vm.md has them.
VMFLAGS ?=

# each runs a command in every module.
each = @set -e; for m in $(MODULES); do echo "== $$m"; (cd $$m && $(1)); done

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: deps
deps: ## install by apt-get the programs that tests call, if they are missing
	@scripts/deps.sh

.PHONY: build
build: ## compile every module
	$(call each,$(GO) build -o /dev/null ./...)

.PHONY: test
test: deps ## vet and test every module (needs root, else what needs it is skipped)
	$(call each,$(GO) vet ./... && $(GO) test -timeout 20m $(TESTFLAGS) ./...)

# What tries one thing after the other, mostly in other processes, has no races to find and takes long.
NORACE := ^Test(Damage|Faults|Docker.*|ImportingWeight|Kill|KillSteps|KillChildren|RepairKilled)$$

.PHONY: test-race
test-race: deps ## test the library and the tool with the race detector
	$(GO) test -race -timeout 20m -skip '$(NORACE)' $(TESTFLAGS) ./...
	@set -e; if [ -d cmd/overlay2 ]; then cd cmd/overlay2 && $(GO) test -race $(TESTFLAGS) ./...; fi

.PHONY: lint
lint: ## run the pinned golangci-lint over every module (the first time compiles it: minutes)
	@lint=$$($(GO) -C tools tool -n golangci-lint) || exit 1; status=0; for m in $(MODULES); do echo "== $$m"; \
		(cd $$m && $$lint run --config $(CURDIR)/.golangci.yml ./...) || status=1; done; exit $$status

.PHONY: vet-all
vet-all: ## vet the library for every system that it compiles on
	@status=0; for s in linux/amd64 linux/arm64 linux/386 linux/ppc64le darwin/arm64; do echo "== $$s"; \
		GOOS=$${s%/*} GOARCH=$${s#*/} $(GO) vet ./... || status=1; done; exit $$status

.PHONY: check
check: ## formatting, go.mod files, allowed modules, sizes of files, shell scripts
	@scripts/check.sh

.PHONY: test-kill
test-kill: ## kill -9 before each system call of each call, and 500 times at random under load: minutes
	OVERLAY2_TEST_CUTS=0 $(GO) test -count=1 -run '^TestKillSteps$$' -v $(TESTFLAGS) .
	OVERLAY2_TEST_CUTS=500 $(GO) test -count=1 -timeout 60m -run '^TestKill$$' -v $(TESTFLAGS) .

.PHONY: test-processes
test-processes: ## four processes on one home, one of them killed again and again: DURATION (5m)
	OVERLAY2_TEST_DURATION=$(or $(DURATION),5m) $(GO) test -count=1 -timeout 60m -run '^TestProcesses$$' -v $(TESTFLAGS) .

.PHONY: soak
soak: ## random calls of eight goroutines with a model beside: DURATION (30m); OVERLAY2_TEST_SEED repeats a run
	OVERLAY2_TEST_SOAK=$(or $(DURATION),30m) $(GO) test -count=1 -timeout 0 -run '^TestSoak$$' -v $(TESTFLAGS) .

.PHONY: test-faults
test-faults: ## let each system call of each call fail with each of six errors: twenty minutes
	OVERLAY2_TEST_FAULTS_ALL=1 $(GO) test -count=1 -timeout 3h -run '^TestFaults$$' -v $(TESTFLAGS) .

.PHONY: test-docker
test-docker: deps ## a home that Debian's dockerd and the library use in turns: a minute
	OVERLAY2_TEST_REQUIRE=$(or $(OVERLAY2_TEST_REQUIRE),dockerd) $(GO) test -count=1 -run '^TestDocker' -v $(TESTFLAGS) .

.PHONY: fuzz-quick
fuzz-quick: ## run every fuzz test for FUZZTIME (20s)
	@scripts/fuzz.sh $(FUZZTIME)

.PHONY: test-scale
test-scale: ## 5 million entries, a million names in a directory, 10 GiB in a file: needs 25 GB in TMPDIR, 15 minutes
	OVERLAY2_TEST_SCALE=1 $(GO) test -v -timeout 60m -run '^TestScale$$' ./archive

.PHONY: test-vm
test-vm: ## test in guests with Linux 6.1 and 6.12: project quotas on xfs and ext4 (VMFLAGS='-pkg quota -v')
	$(GO) run ./internal/vmtest $(VMFLAGS)

# The driver's tests that a kernel can decide; what they leave out is the whole of test-vm.
VMCI := ^Test(Limit|Resize|Size|Inodes|Usage|GetPut|GetCommitted|LayerOnDisk|ApplyDiff|DeepChain|Remove|Adopt|RootOpaque|Incomplete|Rename|NewMakesHome|DiffWhileMounted|ChildrenOf|SealAtOnce)

.PHONY: test-vm-ci
test-vm-ci: ## what .ci/run runs in guests: quotas, and the driver where kernels differ
	$(GO) run ./internal/vmtest -pkg quota
	$(GO) run ./internal/vmtest -pkg . -run '$(VMCI)'
	$(GO) run ./internal/vmtest -guest uml-6.1 -module graphdriver/mobyhome
	$(GO) run ./internal/vmtest -guest uml-6.1 -module snapshotter -pkg . -run Limit

.PHONY: test-powercut
test-powercut: ## kill a guest while it works on layers, CUTS times (100), and look at what is left: an hour
	$(GO) run ./internal/vmtest -cuts 40 -unsafe $(VMFLAGS)
	$(GO) run ./internal/vmtest -cuts $(or $(CUTS),100) $(VMFLAGS)

.PHONY: test-vm-quota
test-vm-quota: ## moby's own driver and the library on one home with quotas, in a guest
	$(GO) run ./internal/vmtest -guest uml-6.1 -module graphdriver/mobyhome $(VMFLAGS)

.PHONY: test-vm-all
test-vm-all: ## the same in all guests: SELinux on, pages of 64 KiB too
	$(GO) run ./internal/vmtest -all $(VMFLAGS)

.PHONY: test-clients
test-clients: ## real clients: Debian's dockerd on this library by a plugin, a registry, podman, buildah, skopeo, umoci; CLIENTS=all kills more often
	@scripts/deps.sh clients
	cd cmd/overlay2 && OVERLAY2_TEST_REQUIRE=all \
		$(GO) test -count=1 -timeout 60m -run '^Test(Registry|Podman|Buildah|DockerSave|ExportIsReadByOthers)$$' -v $(TESTFLAGS) .
	cd graphdriver && OVERLAY2_TEST_CLIENTS=$(or $(CLIENTS),quick) OVERLAY2_TEST_REQUIRE=all \
		$(GO) test -count=1 -timeout 60m -run '^TestDockerd$$' -v $(TESTFLAGS) ./internal/plugin

.PHONY: test-containerd
test-containerd: deps ## Debian's containerd on this library by the proxy plugin; CLIENTS=all kills more often (a minute or two)
	cd snapshotter && OVERLAY2_TEST_CLIENTS=$(or $(CLIENTS),quick) OVERLAY2_TEST_REQUIRE=all \
		$(GO) test -count=1 -timeout 60m -run '^TestContainerd$$' -v $(TESTFLAGS) ./cmd/overlay2-snapshotter

.PHONY: test-vm-graphdriver
test-vm-graphdriver: ## moby's driver suite in guests, its quota test included
	$(GO) run ./internal/vmtest -repo graphdriver -pkg . $(VMFLAGS)

.PHONY: bench-quick
bench-quick: ## this library beside its peers and the limits on a small layer: a few minutes
	cd benchmarks && $(GO) run . -quick $(BENCHFLAGS)

.PHONY: bench-report
bench-report: ## the whole comparison, written to docs/performance.md and .svg: an hour or two
	cd benchmarks && $(GO) run . -report ../docs $(BENCHFLAGS)

.PHONY: demo
demo: ## the whole life of an image, shown and verified; IMAGE=path takes your own
	@cmd/overlay2/demo.sh $(IMAGE)

.PHONY: ci
ci: ## all that a change must pass
	@.ci/run
