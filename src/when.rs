//! Times and durations as people write and read them: nanoseconds since 1970, UTC.
//! Days and dates by Howard Hinnant's `civil_from_days` and `days_from_civil`.

use std::time::{SystemTime, UNIX_EPOCH};

const SECOND_NS: i64 = 1_000_000_000;

/// Now.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// `YYYY-MM-DD HH:MM:SS.mmm`.
pub(crate) fn show(ns: i64) -> String {
    let (seconds, millis) = (ns.div_euclid(SECOND_NS), ns.rem_euclid(SECOND_NS) / 1_000_000);
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{millis:03}")
}

/// A date, with a time of day behind a space or `T` if there is one.
pub(crate) fn parse(text: &str) -> Option<i64> {
    let text = text.trim().trim_end_matches('Z').trim_end_matches(" UTC");
    let (date, time) = text.split_once([' ', 'T']).unwrap_or((text, "00:00:00"));
    let number = |part: Option<&str>| part.and_then(|part| part.parse::<i64>().ok());
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next())?, number(date.next())?, number(date.next())?);
    let mut time = time.split(':');
    let (hour, minute) = (number(time.next())?, number(time.next())?);
    let second: f64 = time.next().unwrap_or("0").parse().ok()?;
    let fits = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0.0..61.0).contains(&second);
    if !fits {
        return None;
    }
    let shifted_year = year - i64::from(month <= 2);
    let era = shifted_year.div_euclid(400);
    let year_of_era = shifted_year.rem_euclid(400);
    let shifted_month = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    let seconds = days.checked_mul(86_400)?.checked_add(hour * 3600 + minute * 60)?;
    seconds.checked_mul(SECOND_NS)?.checked_add((second * SECOND_NS as f64) as i64)
}

/// A length of time, short: `1.200 s`, `15 ms`, `3 min 20 s`.
pub(crate) fn length(ns: u64) -> String {
    let seconds = ns as f64 / SECOND_NS as f64;
    match ns {
        0 => "0 s".to_owned(),
        ns if ns < 1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        ns if ns < SECOND_NS as u64 => format!("{:.1} ms", ns as f64 / 1e6),
        _ if seconds < 120.0 => format!("{seconds:.3} s"),
        _ => format!("{} min {:.0} s", (seconds / 60.0).floor(), seconds % 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_as_it_is_shown() {
        for ns in [0, 951_782_400_000_000_000, 1_795_342_030_756_000_000, -86_400_000_000_000] {
            assert_eq!(parse(&show(ns)), Some(ns));
        }
        assert_eq!(parse("2026-11-22T10:07:10Z"), Some(1_795_342_030_000_000_000));
        assert_eq!(parse("2026-13-01"), None);
        assert_eq!(parse("yesterday"), None);
    }
}
