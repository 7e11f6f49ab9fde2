module github.com/bcc2decd/overlay2/benchmarks/wire

go 1.26.0

require golang.org/x/sys v0.49.0
