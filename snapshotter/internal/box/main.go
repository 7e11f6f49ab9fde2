// Command box is what containers of the tests run: a few commands in one static program.
package main

import (
	"fmt"
	"os"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run does "cat FILE", "ls DIR", "write FILE TEXT", "rm FILE" or "wait".
func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "cat":
		data, err := os.ReadFile(args[1])
		fmt.Fprint(os.Stdout, string(data))
		return err
	case len(args) == 2 && args[0] == "ls":
		entries, err := os.ReadDir(args[1])
		for _, e := range entries {
			fmt.Fprintln(os.Stdout, e.Name())
		}
		return err
	case len(args) == 3 && args[0] == "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case len(args) == 2 && args[0] == "rm":
		return os.Remove(args[1])
	case len(args) == 1 && args[0] == "wait":
		time.Sleep(time.Hour)
		return nil
	}
	return fmt.Errorf("what is %q?", args)
}
