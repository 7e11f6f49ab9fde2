//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// metrics counts calls, and snapshots when it is asked for them.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	took     *prometheus.HistogramVec
}

func newMetrics(sn snapshots.Snapshotter) *metrics {
	const prefix = "overlay2_snapshotter_"
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + "calls_total", Help: "Calls that have ended, by method and gRPC code."}, []string{"method", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "call_duration_seconds", Help: "How long calls took, by method.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}, []string{"method"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + "build_info", Help: "1; the label tells the version.", ConstLabels: prometheus.Labels{"version": version()}})
	info.Set(1)
	m.registry.MustRegister(m.calls, m.took, info, snapshotCounts{sn, prometheus.NewDesc(prefix+"snapshots", "Snapshots, by kind.", []string{"kind"}, nil)},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// shortMethod returns the last part of a method's name.
func shortMethod(full string) string { return path.Base(full) }

func (m *metrics) done(method string, begin time.Time, err error) {
	m.calls.WithLabelValues(shortMethod(method), status.Code(err).String()).Inc()
	m.took.WithLabelValues(shortMethod(method)).Observe(time.Since(begin).Seconds())
}

func (m *metrics) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	begin := time.Now()
	resp, err := handler(ctx, req)
	m.done(info.FullMethod, begin, err)
	return resp, err
}

func (m *metrics) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	begin := time.Now()
	err := handler(srv, ss)
	m.done(info.FullMethod, begin, err)
	return err
}

// serve serves metrics by HTTP, unless address is "".
func (m *metrics) serve(address string, log *slog.Logger) (stop func(), err error) {
	if address == "" {
		return func() {}, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("metrics address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics are served no more", "error", err)
		}
	}()
	log.Info("serving metrics", "address", l.Addr().String())
	return func() {
		if err := srv.Close(); err != nil {
			log.Warn("metrics server", "error", err)
		}
	}, nil
}

// snapshotCounts counts snapshots when metrics are read.
type snapshotCounts struct {
	sn   snapshots.Snapshotter
	desc *prometheus.Desc
}

// Describe tells the one metric.
func (c snapshotCounts) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect counts.
func (c snapshotCounts) Collect(ch chan<- prometheus.Metric) {
	counts := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := c.sn.Walk(context.Background(), func(_ context.Context, info snapshots.Info) error {
		counts[info.Kind]++
		return nil
	})
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.desc, err)
		return
	}
	for kind, n := range counts {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n), strings.ToLower(kind.String()))
	}
}
