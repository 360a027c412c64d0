//go:build !linux

package main

import (
	"errors"
	"net"
	"os"
	"syscall"
)

func listenVsockAt(uint32) (net.Listener, error) { return nil, errors.ErrUnsupported }

func vsockListenerOf(*os.File) (net.Listener, error) { return nil, errors.ErrUnsupported }

func vsockConnOf(*os.File) (net.Conn, error) { return nil, errors.ErrUnsupported }

func duplicate(syscall.Conn) (*os.File, error) { return nil, errors.ErrUnsupported }
