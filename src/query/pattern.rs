//! `$match`: an anchored glob (generations 0.6 and 0.7) or a substring in the sense of SQL's LIKE
//! (before). Protocol.md section 3.2 is the source of both.

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Letter(char),
    /// One character.
    One,
    /// One digit.
    Digit,
    /// One of a class, or none of it.
    Class {
        ranges: Vec<(char, char)>,
        negated: bool,
    },
    /// Any run of characters.
    Run,
}

impl Piece {
    fn takes(&self, letter: char) -> bool {
        match self {
            Self::Letter(own) => *own == letter,
            Self::One => true,
            Self::Digit => letter.is_ascii_digit(),
            Self::Class { ranges, negated } => {
                ranges.iter().any(|(low, high)| (*low..=*high).contains(&letter)) != *negated
            }
            Self::Run => false,
        }
    }
}

/// A checked pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern {
    pieces: Vec<Piece>,
}

/// Which of the two meanings `$match` has for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Anchored: `*` any run, `?` one character, `#` one digit, `[…]` a class.
    Glob,
    /// Anywhere: `%` any run, `_` one character.
    Substring,
}

impl Pattern {
    /// Checks a pattern.
    pub(crate) fn parse(text: &str, meaning: Meaning) -> Result<Self, String> {
        if text.is_empty() {
            return Err("the pattern is empty; use \"*\" for everything".to_owned());
        }
        if text.len() > PATTERN_BYTES_MAX {
            return Err(format!("the pattern has {} bytes, over the limit of {PATTERN_BYTES_MAX}", text.len()));
        }
        let pieces = match meaning {
            Meaning::Glob => glob(text)?,
            Meaning::Substring => {
                let inner = text.chars().map(|letter| match letter {
                    '%' => Piece::Run,
                    '_' => Piece::One,
                    letter => Piece::Letter(letter),
                });
                std::iter::once(Piece::Run).chain(inner).chain([Piece::Run]).collect()
            }
        };
        Ok(Self { pieces })
    }

    /// Whether the whole text fits.
    pub(crate) fn holds(&self, text: &str) -> bool {
        let text: Vec<char> = text.chars().collect();
        let (mut at, mut piece) = (0, 0);
        // Where the last run began: it may have to take one character more.
        let mut retry: Option<(usize, usize)> = None;
        while at < text.len() {
            match self.pieces.get(piece) {
                Some(Piece::Run) => {
                    retry = Some((at, piece));
                    piece += 1;
                }
                Some(one) if one.takes(text[at]) => {
                    at += 1;
                    piece += 1;
                }
                _ => match retry {
                    Some((from, run)) => {
                        retry = Some((from + 1, run));
                        at = from + 1;
                        piece = run + 1;
                    }
                    None => return false,
                },
            }
        }
        self.pieces.iter().skip(piece).all(|piece| *piece == Piece::Run)
    }

    /// The text that everything fitting begins with.
    pub(crate) fn prefix(&self) -> String {
        let letters = self.pieces.iter().map_while(|piece| match piece {
            Piece::Letter(letter) => Some(*letter),
            _ => None,
        });
        letters.collect()
    }
}

fn glob(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let piece = match letter {
            '*' => Piece::Run,
            '?' => Piece::One,
            '#' => Piece::Digit,
            '[' => {
                let negated = letters.next_if(|next| matches!(next, '^' | '!')).is_some();
                let mut ranges = Vec::new();
                loop {
                    match letters.next() {
                        None => return Err(format!("the class in pattern {text:?} has no `]`")),
                        Some(']') if !ranges.is_empty() => break,
                        Some(']') => return Err(format!("the class in pattern {text:?} is empty")),
                        Some(low) => {
                            let high = match letters.next_if_eq(&'-') {
                                Some(_) => letters.next().filter(|high| *high != ']' && low <= *high),
                                None => Some(low),
                            };
                            let Some(high) = high else {
                                return Err(format!("the class in pattern {text:?} has a range without a right end"));
                            };
                            ranges.push((low, high));
                        }
                    }
                }
                Piece::Class { ranges, negated }
            }
            letter => Piece::Letter(letter),
        };
        // Two runs are one; it keeps the search linear.
        if !(piece == Piece::Run && pieces.last() == Some(&Piece::Run)) {
            pieces.push(piece);
        }
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(meaning: Meaning, pattern: &str, yes: &[&str], no: &[&str]) {
        let pattern = Pattern::parse(pattern, meaning).expect("a pattern");
        for text in yes {
            assert!(pattern.holds(text), "{text:?}");
        }
        for text in no {
            assert!(!pattern.holds(text), "{text:?}");
        }
    }

    #[test]
    fn a_glob_is_anchored_and_its_star_crosses_slashes() {
        check(Meaning::Glob, "drive", &["drive"], &["drive1", "my drive", ""]);
        check(Meaning::Glob, "a*c", &["ac", "abc", "a/b/c", "acc"], &["acb", "bac"]);
        check(Meaning::Glob, "*", &["", "x"], &[]);
        check(Meaning::Glob, "run_##?", &["run_12x", "run_123"], &["run_1ax", "run_12"]);
        check(Meaning::Glob, "[a-c]x", &["ax", "cx"], &["dx", "x"]);
        check(Meaning::Glob, "[!a]x", &["bx"], &["ax"]);
        check(Meaning::Glob, "A", &["A"], &["a"]);
        check(Meaning::Glob, "*ab*ab*", &["ababx", "xabyabz"], &["ab", "aab"]);
    }

    #[test]
    fn a_substring_keeps_the_wildcards_of_like() {
        check(Meaning::Substring, "rive", &["drive", "rive", "drives"], &["drve"]);
        check(Meaning::Substring, "d_i%e", &["my drive", "drie"], &["dre"]);
        check(Meaning::Substring, "a*", &["xa*x"], &["ab"]);
    }

    #[test]
    fn broken_patterns_are_refused() {
        for pattern in ["", "[", "[]", "[a", "[a-]", "[b-a]"] {
            assert!(Pattern::parse(pattern, Meaning::Glob).is_err(), "{pattern:?}");
        }
        assert!(Pattern::parse(&"x".repeat(257), Meaning::Glob).is_err());
    }

    #[test]
    fn the_prefix_ends_at_the_first_wildcard() {
        assert_eq!(Pattern::parse("base*x", Meaning::Glob).expect("a pattern").prefix(), "base");
        assert_eq!(Pattern::parse("base", Meaning::Substring).expect("a pattern").prefix(), "");
    }
}
