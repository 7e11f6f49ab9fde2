//go:build !linux

package wire

import "errors"

type usage struct{}

func startUsage() (*usage, error) { return nil, errors.ErrUnsupported }

func (*usage) stop(*Response) error { return errors.ErrUnsupported }

func syncfs(string) error { return errors.ErrUnsupported }
