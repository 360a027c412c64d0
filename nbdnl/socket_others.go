//go:build !linux

package nbdnl

import (
	"errors"
	"syscall"
)

func dupSockets([]syscall.Conn) ([]int, error) { return nil, errors.ErrUnsupported }

func clearSendLimits([]int) ([]struct{}, error) { return nil, errors.ErrUnsupported }

func sendLimited([]int) ([]bool, error) { return nil, errors.ErrUnsupported }

func restoreSendLimits([]int, []struct{}, []bool) error { return errors.ErrUnsupported }

func closeAll([]int) {}

func dupDescriptors([]int) ([]int, error) { return nil, errors.ErrUnsupported }

func shutDownAll([]int) {}

func hungUp([]int) bool { return false }

func isShutDown(syscall.Conn) bool { return false }
