//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/bcc2decd/overlay2/snapshotter"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// serve serves until ctx is done, or something fails.
func serve(ctx context.Context, c config, log *slog.Logger) (err error) {
	// The root comes first: who has it may serve, and nobody else takes the socket from him.
	sn, err := snapshotter.New(c.root, c.options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	l, err := listen(c.address)
	if err != nil {
		return err
	}
	m := newMetrics(sn)
	srv := grpc.NewServer(grpc.ChainUnaryInterceptor(m.unary, logUnary(log)), grpc.ChainStreamInterceptor(m.stream, logStream(log)))
	snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(sn))
	healthy := health.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, healthy)
	defer srv.Stop()
	stopMetrics, err := m.serve(c.metrics, log)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer stopMetrics()
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	log.Info("serving", "address", c.address, "root", c.root, "version", version())
	if err := notify("READY=1"); err != nil {
		log.Warn("systemd was not told", "error", err)
	}
	select {
	case err := <-failed:
		return fmt.Errorf("%s: %w", c.address, err)
	case <-ctx.Done():
	}
	log.Info("stopping")
	if err := notify("STOPPING=1"); err != nil {
		log.Warn("systemd was not told", "error", err)
	}
	healthy.Shutdown()
	stop(srv, c.stopTimeout, log)
	return nil
}

// stop lets calls end, but not for longer than timeout.
func stop(srv *grpc.Server, timeout time.Duration, log *slog.Logger) {
	t := time.AfterFunc(timeout, func() {
		log.Warn("calls have not ended and are cut off", "after", timeout)
		srv.Stop()
	})
	defer t.Stop()
	srv.GracefulStop()
}

func logUnary(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		begin := time.Now()
		resp, err := handler(ctx, req)
		logCall(ctx, log, info.FullMethod, req, begin, err)
		return resp, err
	}
}

func logStream(log *slog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		begin := time.Now()
		err := handler(srv, ss)
		logCall(ss.Context(), log, info.FullMethod, nil, begin, err)
		return err
	}
}

// logCall logs a call: what containerd asks in the course of things at debug level, refusals at info, the rest as errors.
func logCall(ctx context.Context, log *slog.Logger, method string, req any, begin time.Time, err error) {
	level := slog.LevelError
	switch status.Code(err) {
	case codes.OK, codes.NotFound, codes.AlreadyExists, codes.Canceled:
		level = slog.LevelDebug
	case codes.FailedPrecondition, codes.InvalidArgument, codes.Unimplemented, codes.DeadlineExceeded:
		level = slog.LevelInfo
	}
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.String("method", shortMethod(method)), slog.Duration("took", time.Since(begin))}
	if md, ok := metadata.FromIncomingContext(ctx); ok && len(md["containerd-namespace"]) > 0 {
		attrs = append(attrs, slog.String("namespace", md["containerd-namespace"][0]))
	}
	if r, ok := req.(interface{ GetKey() string }); ok {
		attrs = append(attrs, slog.String("key", r.GetKey()))
	}
	if r, ok := req.(interface{ GetName() string }); ok {
		attrs = append(attrs, slog.String("name", r.GetName()))
	}
	if r, ok := req.(interface{ GetParent() string }); ok && r.GetParent() != "" {
		attrs = append(attrs, slog.String("parent", r.GetParent()))
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()), slog.String("code", status.Code(err).String()))
	}
	log.LogAttrs(ctx, level, "call", attrs...)
}
