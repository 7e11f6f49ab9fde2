module github.com/bcc2decd/overlay2/cmd/overlay2

go 1.26.0

require (
	github.com/klauspost/compress v1.20.3
	github.com/opencontainers/go-digest v1.0.0
	github.com/opencontainers/image-spec v1.1.1
	golang.org/x/sys v0.49.0
)

require (
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/google/go-containerregistry v0.22.1
	golang.org/x/sync v0.22.0 // indirect
)

replace github.com/bcc2decd/overlay2 => ../..
