//go:build linux

package snapshotter

import (
	"context"
	"io"
	"log/slog"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// driverLog returns a logrus entry, as the driver and containerd's packages want one, that writes to another log.
func driverLog(to *slog.Logger) *logrus.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.TraceLevel) // to decides
	l.AddHook(slogHook{to})
	return logrus.NewEntry(l)
}

// tx calls f in a transaction of the store, which logs where the Snapshotter does. Others may have been waited for: who is
// not there any more by then gets nothing done that nobody would know of.
func (s *Snapshotter) tx(ctx context.Context, writable bool, f storage.TransactionCallback) error {
	return s.store.WithTransaction(log.WithLogger(ctx, s.storeLog), writable, func(ctx context.Context) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return f(ctx)
	})
}

// slogHook passes log entries on.
type slogHook struct{ log *slog.Logger }

// Levels returns all levels.
func (slogHook) Levels() []logrus.Level { return logrus.AllLevels }

// Fire passes one on.
func (h slogHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	switch {
	case e.Level <= logrus.ErrorLevel:
		level = slog.LevelError
	case e.Level == logrus.WarnLevel:
		level = slog.LevelWarn
	case e.Level == logrus.InfoLevel:
		level = slog.LevelInfo
	}
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	h.log.LogAttrs(ctx, level, e.Message, attrs...)
	return nil
}
