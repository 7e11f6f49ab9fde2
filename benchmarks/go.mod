module github.com/bcc2decd/overlay2/benchmarks

go 1.26.0

require (
	github.com/bcc2decd/overlay2 v0.0.0
	github.com/bcc2decd/overlay2/benchmarks/wire v0.0.0
	golang.org/x/sys v0.49.0
)

require (
	github.com/cyphar/filepath-securejoin v0.5.1 // indirect
	github.com/docker/go-units v0.5.0 // indirect
	github.com/moby/sys/mount v0.3.5 // indirect
	github.com/moby/sys/mountinfo v0.7.3 // indirect
	github.com/opencontainers/selinux v1.15.1 // indirect
	github.com/sirupsen/logrus v1.10.2 // indirect
)

replace (
	github.com/bcc2decd/overlay2 => ..
	github.com/bcc2decd/overlay2/benchmarks/wire => ./wire
)
