module github.com/bcc2decd/overlay2

go 1.26.0

require (
	github.com/docker/go-units v0.5.0
	github.com/moby/sys/mount v0.3.5
	github.com/moby/sys/mountinfo v0.7.3
	github.com/opencontainers/selinux v1.15.1
	github.com/sirupsen/logrus v1.10.2
	golang.org/x/sys v0.49.0
)

require github.com/cyphar/filepath-securejoin v0.5.1 // indirect
